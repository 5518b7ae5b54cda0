"""Push + pull round trips of one worker, beside the floor: `python -m benchmarks.roundtrip`.

Each round sends a gradient to a service in another process, has AdamW Schedule-Free applied, and receives fresh y: as
fp32, and as BF16 both ways. Rounds of the floor and of freestep alternate, so that all see the same machine; figures
are medians, and a ratio is the median of each round's ratio.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, Report, spread
from benchmarks.floor import CopyPass, Cost, raw_echo
from benchmarks.options import Options, parser_of_sizes
from benchmarks.services import Service, running_service
from benchmarks.worker import Worker, new_run
from freestep import Client, FreestepError

SIZES = {100_000: 300, 5_000_000: 15, 25_000_000: 15}
"""Parameters, and how many rounds are counted."""
QUICK_SIZES = {100_000: 20, 5_000_000: 5}
WARMUP = 2

MOST_TIME, MOST_CPU, MOST_BF16 = 1.25, 1.3, 0.65
"""To be reached at the largest size: of the floor's time and the server's CPU, and BF16's time of fp32's."""

_SETTLED_S = 0.02
"""What a push leaves to be done after its answer is done by then."""


@dataclass(frozen=True)
class Round:
    """The floor, and a push + pull as fp32 and as BF16, whose CPU is the service's and its store's."""

    floor: Cost
    fp32: Cost
    bf16: Cost

    @property
    def time_ratio(self) -> float:
        return self.fp32.seconds / self.floor.seconds

    @property
    def cpu_ratio(self) -> float:
        return self.fp32.cpu / self.floor.cpu

    @property
    def bf16_ratio(self) -> float:
        return self.bf16.seconds / self.fp32.seconds


_FIGURES: tuple[tuple[str, Callable[[Round], float], str, float | None], ...] = (
    ("floor", lambda each: 1e3 * each.floor.seconds, "ms", None),
    ("push + pull, fp32", lambda each: 1e3 * each.fp32.seconds, "ms", None),
    ("push + pull, fp32, of the floor", lambda each: each.time_ratio, "×", MOST_TIME),
    ("push + pull, BF16 both ways, of fp32", lambda each: each.bf16_ratio, "×", MOST_BF16),
    ("server's CPU, fp32, of raw copy + update", lambda each: each.cpu_ratio, "×", MOST_CPU),
)
"""Of each size: title, figure, unit, and the most at the largest."""


@dataclass(frozen=True)
class Row:
    """The rounds of one model size."""

    parameters: int
    rounds: list[Round]

    def middle(self, figure: Callable[[Round], float]) -> float:
        return median(map(figure, self.rounds))

    def document(self) -> dict[str, Any]:
        """Milliseconds; the spread is between the quartiles of freestep's rounds."""
        return {
            "parameters": self.parameters,
            "floor_ms": 1e3 * self.middle(lambda each: each.floor.seconds),
            "freestep_ms": 1e3 * self.middle(lambda each: each.fp32.seconds),
            "spread_ms": 2e3 * spread([each.fp32.seconds for each in self.rounds]),
            "bf16_ms": 1e3 * self.middle(lambda each: each.bf16.seconds),
            "ratio": self.middle(lambda each: each.time_ratio),
            "cpu_ratio": self.middle(lambda each: each.cpu_ratio),
            "bf16_ratio": self.middle(lambda each: each.bf16_ratio),
        }


def measure(service: Service, parameters: int, rounds: int) -> Row:
    """Alternates rounds of the floor and of freestep for one model size."""
    taken = []
    with ExitStack() as stack:
        client = stack.enter_context(Client(service.url))
        run = new_run(client, f"roundtrip-{parameters}", parameters)
        stack.callback(run.delete)
        fp32 = stack.enter_context(Worker(run, "fp32"))
        bf16 = stack.enter_context(Worker(run, "bf16", "BF16"))
        echo, memory = stack.enter_context(raw_echo(4 * parameters)), CopyPass(parameters)
        for number in range(WARMUP + rounds):
            floor = echo.once(fp32.gradient.bytes, fp32.arriving.bytes) + memory.once()
            each = Round(floor, _cost(service, fp32), _cost(service, bf16))
            if number >= WARMUP:
                taken.append(each)
    return Row(parameters, taken)


def _cost(service: Service, worker: Worker) -> Cost:
    before = service.cpu_seconds()
    seconds = worker.push()
    time.sleep(_SETTLED_S)
    return Cost(seconds, service.cpu_seconds() - before)


def measure_sizes(sizes: dict[int, int]) -> list[Row]:
    """Each size in turn, with so many rounds."""
    with running_service() as service:
        return [measure(service, parameters, rounds) for parameters, rounds in sizes.items()]


def report(options: Options) -> Report:
    rows = measure_sizes(QUICK_SIZES if options.quick else SIZES)
    figures = [
        Figure.of(
            f"{row.parameters / 1e6:g}M {title}",
            map(of, row.rounds),
            unit,
            most=most if row.parameters == max(SIZES) else None,
        )
        for row in rows
        for title, of, unit, most in _FIGURES
    ]
    return Report(figures, details=[row.document() for row in rows])


def main() -> None:
    options = parser_of_sizes(__doc__, SIZES).parse_args()
    torch.set_num_threads(1)
    try:
        rows = measure_sizes({size: rounds for size, rounds in SIZES.items() if size <= options.largest})
    except FreestepError as error:
        sys.exit(str(error))
    documents = [row.document() for row in rows]
    if options.json:
        print(json.dumps(documents, indent=2))
        return
    table = Table("parameters", "floor ms", "freestep ms", "quartile spread ms", "ratio", title="push + pull, fp32")
    for each in documents:
        figures = (each[name] for name in ("floor_ms", "freestep_ms", "spread_ms", "ratio"))
        table.add_row(f"{each['parameters']:,}", *(f"{figure:.2f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
