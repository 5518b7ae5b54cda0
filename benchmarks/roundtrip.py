"""Push + pull round trips of one worker, beside the floor: `python -m benchmarks.roundtrip`.

Each round sends a fp32 gradient to a service in another process, has AdamW Schedule-Free applied, and receives
fresh y. Rounds of the floor and of freestep alternate, so that both see the same machine; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.floor import copy_pass, echo_once, raw_echo
from benchmarks.services import running_service
from freestep import Client, Flat, FreestepError

SIZES = {100_000: 300, 5_000_000: 15, 25_000_000: 7}
"""Parameters, and how many rounds are counted."""
WARMUP = 2


@dataclass(frozen=True)
class Row:
    """Milliseconds: medians, and the spread between the quartiles of freestep's rounds."""

    parameters: int
    floor_ms: float
    freestep_ms: float
    spread_ms: float

    @property
    def ratio(self) -> float:
        return self.freestep_ms / self.floor_ms


def measure(client: Client, parameters: int, rounds: int) -> Row:
    """Alternates rounds of the floor and of freestep for one model size."""
    run = client.run(f"roundtrip-{parameters}")
    run.create(
        {
            "optimizer": {"algorithm": "adamw_schedule_free"},
            "aggregation": {"policy": "async"},
            "parameters": [{"name": "w", "shape": [parameters]}],
            "durability": "none",
        }
    )
    gradient, arriving = Flat(run.manifest), Flat(run.manifest)
    run.initialize(gradient)
    gradient.vector.normal_(generator=torch.Generator().manual_seed(0))
    floor, freestep = [], []
    with run.lease("roundtrip") as lease, raw_echo(4 * parameters) as connection:
        step = 0
        for number in range(WARMUP + rounds):
            socket_s = echo_once(connection, gradient.bytes, arriving.bytes)
            began = time.perf_counter()
            _, pulled = run.exchange(gradient, lease.claim(step), arriving)
            seconds = time.perf_counter() - began
            step = pulled.step
            if number >= WARMUP:
                floor.append(socket_s)
                freestep.append(seconds)
    run.delete()
    low, _, high = quantiles(freestep, n=4)
    return Row(parameters, 1e3 * (median(floor) + copy_pass(parameters)), 1e3 * median(freestep), 1e3 * (high - low))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--largest", type=int, default=max(SIZES), help="leave out sizes above this many parameters")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with running_service() as service, Client(service.url) as client:
        for parameters, rounds in SIZES.items():
            if parameters <= options.largest:
                try:
                    rows.append(measure(client, parameters, rounds))
                except FreestepError as error:
                    sys.exit(f"{parameters} parameters: {error}")
    if options.json:
        print(json.dumps([{**asdict(row), "ratio": row.ratio} for row in rows], indent=2))
        return
    table = Table("parameters", "floor ms", "freestep ms", "quartile spread ms", "ratio", title="push + pull, fp32")
    for row in rows:
        figures = (row.floor_ms, row.freestep_ms, row.spread_ms, row.ratio)
        table.add_row(f"{row.parameters:,}", *(f"{figure:.2f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
