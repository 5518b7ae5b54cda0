"""Push + pull round trips of one worker, beside the floor: `python -m benchmarks.roundtrip`.

Each round sends a gradient to a service in another process, has AdamW Schedule-Free applied, and receives fresh y: as
fp32 and as BF16 both ways over a connection, and as fp32 through memory that both processes share. Rounds of the floor
and of freestep alternate, so that all see the same machine; figures are medians, and a ratio is the median of each
round's ratio.
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
MOST_CPU_ROUNDS = 50
"""Rounds in which CPU is counted are others, since what a push leaves to be done has to be waited for."""

MOST_TIME, MOST_CPU, MOST_BF16, MOST_SHARED = 1.25, 1.3, 0.65, 0.5
"""To be reached at the largest size: of the floor's time and the server's CPU, BF16's time of fp32's, and what a push +
pull through shared memory takes beside the update, of what the socket's bytes alone take."""

_SETTLED_S = 0.02
"""What a push leaves to be done after its answer is done by then."""


@dataclass(frozen=True)
class Round:
    """Seconds of the floor's bytes and update, and of a push + pull as fp32, as BF16, and through shared memory."""

    socket: float
    update: float
    fp32: float
    bf16: float
    shared: float

    @property
    def floor(self) -> float:
        return self.socket + self.update


@dataclass(frozen=True)
class Row:
    """The rounds of one model size; and of each round in which CPU is counted, the service's of the floor's.

    shares: whether memory was shared, which small bodies do not need.
    """

    parameters: int
    rounds: list[Round]
    cpu_ratios: list[float]
    shares: bool

    def ms(self, figure: Callable[[Round], float]) -> list[float]:
        return [1e3 * figure(each) for each in self.rounds]

    @property
    def ratios(self) -> list[float]:
        return [each.fp32 / each.floor for each in self.rounds]

    @property
    def bf16_ratios(self) -> list[float]:
        return [each.bf16 / each.fp32 for each in self.rounds]

    @property
    def shared_ratios(self) -> list[float]:
        return [(each.shared - each.update) / each.socket for each in self.rounds]

    def figures(self) -> list[Figure]:
        size, bounded = f"{self.parameters / 1e6:g}M", self.parameters == max(SIZES)

        def ratio(title: str, ratios: list[float], most: float) -> Figure:
            return Figure.of(f"{size} {title}", ratios, "×", most=most if bounded else None)

        shared = [
            Figure.of(f"{size} push + pull, fp32, shared memory", self.ms(lambda each: each.shared), "ms"),
            ratio("without the update, of the socket's bytes", self.shared_ratios, MOST_SHARED),
        ]
        return [
            Figure.of(f"{size} floor", self.ms(lambda each: each.floor), "ms"),
            Figure.of(f"{size} push + pull, fp32", self.ms(lambda each: each.fp32), "ms"),
            ratio("push + pull, fp32, of the floor", self.ratios, MOST_TIME),
            ratio("push + pull, BF16 both ways, of fp32", self.bf16_ratios, MOST_BF16),
            *(shared if self.shares else []),
            ratio("server's CPU, fp32, of raw copy + update", self.cpu_ratios, MOST_CPU),
        ]

    def document(self) -> dict[str, Any]:
        """Milliseconds; the spread is between the quartiles of freestep's rounds."""
        return {
            "parameters": self.parameters,
            "floor_ms": median(self.ms(lambda each: each.floor)),
            "freestep_ms": median(self.ms(lambda each: each.fp32)),
            "spread_ms": 2 * spread(self.ms(lambda each: each.fp32)),
            "bf16_ms": median(self.ms(lambda each: each.bf16)),
            "socket_ms": median(self.ms(lambda each: each.socket)),
            "shared_ms": median(self.ms(lambda each: each.shared)) if self.shares else None,
            "ratio": median(self.ratios),
            "bf16_ratio": median(self.bf16_ratios),
            "shared_ratio": median(self.shared_ratios) if self.shares else None,
            "cpu_ratio": median(self.cpu_ratios),
        }


def measure(service: Service, parameters: int, rounds: int) -> Row:
    """Alternates rounds of the floor and of freestep for one model size."""
    with ExitStack() as stack:
        client = stack.enter_context(Client(service.url, shared_memory=False))
        run = new_run(client, f"roundtrip-{parameters}", parameters)
        stack.callback(run.delete)
        fp32 = stack.enter_context(Worker(run, "fp32"))
        bf16 = stack.enter_context(Worker(run, "bf16", "BF16"))
        sharing = stack.enter_context(Client(service.url, shared_memory=True)).run(run.name)
        shared = stack.enter_context(Worker(sharing, "shared"))
        echo, memory = stack.enter_context(raw_echo(4 * parameters)), CopyPass(parameters)

        def socket() -> Cost:
            return echo.once(fp32.gradient.bytes, fp32.arriving.bytes)

        def round_() -> Round:
            return Round(socket().seconds, memory.once().seconds, fp32.push(), bf16.push(), shared.push())

        taken = [round_() for _ in range(WARMUP + rounds)]
        shares = sharing.shares_memory
        used = [
            ((socket() + memory.once()).cpu, _cpu(service, fp32)) for _ in range(WARMUP + min(rounds, MOST_CPU_ROUNDS))
        ]
    return Row(parameters, taken[WARMUP:], [ours / its for its, ours in used[WARMUP:]], shares)


def _cpu(service: Service, worker: Worker) -> float:
    """Seconds of CPU that a push costs the service and its store, what is done after the answer included."""
    time.sleep(_SETTLED_S)
    before = service.cpu_seconds()
    worker.push()
    time.sleep(_SETTLED_S)
    return service.cpu_seconds() - before


def measure_sizes(sizes: dict[int, int]) -> list[Row]:
    """Each size in turn, with so many rounds."""
    with running_service(shared_memory="true") as service:
        return [measure(service, parameters, rounds) for parameters, rounds in sizes.items()]


def report(options: Options) -> Report:
    rows = measure_sizes(QUICK_SIZES if options.quick else SIZES)
    return Report([figure for row in rows for figure in row.figures()], details=[row.document() for row in rows])


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
    columns = ("floor ms", "freestep ms", "quartile spread ms", "ratio", "socket ms", "shared memory ms")
    table = Table("parameters", *columns, title="push + pull, fp32")
    for each in documents:
        names = ("floor_ms", "freestep_ms", "spread_ms", "ratio", "socket_ms", "shared_ms")
        figures = (each[name] for name in names)
        table.add_row(f"{each['parameters']:,}", *("" if figure is None else f"{figure:.2f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
