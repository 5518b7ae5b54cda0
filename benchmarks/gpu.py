"""What an update and a push cost on a GPU: `python -m benchmarks.gpu`. Without one it says so.

The update is AdamW Schedule-Free's, beside a pass of as many bytes at the bandwidth of a large copy on the card: until
it is done, and on the card alone, without the host's part of it. The push is of BF16, from this process to a service on
the same host, until its update is applied. Ingest alone is the same body sent to a process that does no more than
receive it as the service does, into pinned memory. Rounds alternate; figures are medians, and a ratio is the median of
each round's ratio.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.figures import Figure, Report, print_table
from benchmarks.floor import BYTES_PER_PARAMETER
from benchmarks.ingest import ingest_alone
from benchmarks.options import Options
from benchmarks.services import running_service
from benchmarks.updates import freestep
from benchmarks.worker import new_run
from freestep import Client, Flat
from freestep_service.optimizers.kernels.streams import settle

PARAMETERS, ROUNDS = 124_000_000, 15
QUICK_PARAMETERS, QUICK_ROUNDS = 5_000_000, 5
UPDATES_A_ROUND = 10
"""Rounds of updates for one of pushes: they are so short that a moment's hiccup of the host would be all of them."""
PROFILES = 3
"""Rounds of what the card alone takes, which hardly moves."""
WARMUP = 3
STEPS = 10
"""Of a round, which together are what is timed."""
LEAST_BANDWIDTH, MOST_OF_INGEST = 0.8, 1.3


def report(options: Options) -> Report:
    if not torch.cuda.is_available():
        return Report(notes=["not measured: there is no CUDA device"])
    parameters, rounds = (QUICK_PARAMETERS, QUICK_ROUNDS) if options.quick else (PARAMETERS, ROUNDS)
    figures = [*_update(parameters, rounds * UPDATES_A_ROUND), *_push(parameters, rounds)]
    return Report(figures, [f"{torch.cuda.get_device_name()}; ingest alone is the body received, and digested"])


def _update(parameters: int, rounds: int) -> list[Figure]:
    device = torch.device("cuda")
    gradient, weights = (torch.randn(parameters, device=device) for _ in range(2))
    step = freestep("adamw_schedule_free", gradient, weights)

    def copy() -> None:
        weights.copy_(gradient)
        settle(device)

    # A copy reads and writes each element once.
    moved = BYTES_PER_PARAMETER / (2 * gradient.itemsize)
    updates, passes = [], []
    for number in range(WARMUP + rounds):
        # What was asked of the GPU is done when it returns.
        update, copied = _seconds(step), _seconds(copy)
        if number >= WARMUP:
            updates.append(update)
            passes.append(copied * moved)
    name = f"{parameters / 1e6:g}M AdamW Schedule-Free"
    shares = [least / taken for least, taken in zip(passes, updates, strict=True)]
    alone = [_on_the_card(copy) * moved / _on_the_card(step) for _ in range(PROFILES)]
    return [
        Figure.of(name, (1e3 * seconds for seconds in updates), "ms"),
        Figure.of(f"{name}, of the copy bandwidth", shares, "×", least=LEAST_BANDWIDTH),
        Figure.of(f"{name}, on the card alone", alone, "×"),
    ]


def _seconds(work: Callable[[], None]) -> float:
    """Of one time, which several are timed for."""
    began = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - began) / STEPS


def _on_the_card(work: Callable[[], None]) -> float:
    """As `_seconds`, of what the GPU does alone."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            work()
    microseconds: float = sum(event.self_device_time_total for event in profiled.key_averages())
    return microseconds / 1e6 / STEPS


def _push(parameters: int, rounds: int) -> list[Figure]:
    pushes, ingests = [], []
    with (
        running_service(device="cuda") as service,
        Client(service.url) as client,
        ingest_alone(parameters, "cuda") as ingest,
    ):
        run = new_run(client, "gpu", parameters)
        gradient = Flat(run.manifest, "BF16")
        gradient.vector.normal_(generator=torch.Generator().manual_seed(0))
        with run.lease("bench") as lease:
            step = 0
            for number in range(WARMUP + rounds):
                began = time.perf_counter()
                step = run.push(gradient, lease.claim(step)).step
                push = time.perf_counter() - began
                began = time.perf_counter()
                ingest.once(gradient)
                if number >= WARMUP:
                    pushes.append(push)
                    ingests.append(time.perf_counter() - began)
    name = f"{parameters / 1e6:g}M push, BF16"
    ratios = [push / ingest for push, ingest in zip(pushes, ingests, strict=True)]
    return [
        Figure.of(name, (1e3 * seconds for seconds in pushes), "ms"),
        Figure.of(f"{name}, of ingest alone", ratios, "×", most=MOST_OF_INGEST),
    ]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds of a smaller model")
    print_table({"gpu": report(Options(quick=parser.parse_args().quick))})


if __name__ == "__main__":
    main()
