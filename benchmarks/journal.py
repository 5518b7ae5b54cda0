"""What durability `journal` costs: push + pull of a large model, the pushes of many workers, and the way back.

A large model's round trips under `checkpoint` and under `journal` take turns with the disk's floor: a plain program
that writes the gradient's bytes to the same directory, and has them on disk. So do windows of many workers of a small
model, in memory and on a disk alike. Then the service is killed: what its next start takes longer than one with a push
alone to replay is the time in which the journal is read and applied. No checkpoint falls into what is measured.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from benchmarks.crew import Crew
from benchmarks.figures import Figure, Report
from benchmarks.options import Options
from benchmarks.services import Service, service_in
from benchmarks.worker import Worker, new_run
from freestep import Client, FreestepError

LARGE, ROUNDS, WARMUP = 25_000_000, 15, 2
QUICK_LARGE, QUICK_ROUNDS = 5_000_000, 5
SMALL, WORKERS = 100_000, 64
WINDOWS, SECONDS = 5, 3.0
QUICK_WINDOWS, QUICK_SECONDS = 2, 1.0
RECOVERIES, REPLAYED_S = 3, 10.0
QUICK_RECOVERIES, QUICK_REPLAYED_S = 1, 4.0
"""Seconds for which workers push before a kill: enough for the way back to be longer than starts differ."""

MOST_TIME, LEAST_RATE, LEAST_REPLAY = 1.3, 0.6, 0.5

DISK, MEMORY = Path("/var/tmp"), Path("/dev/shm")
"""Where files outlive a restart of the machine, and where they are in memory."""

_SETTINGS = {"checkpoint_seconds": "1e6", "checkpoint_steps": "1000000000", "journal_max_bytes": str(64 * 1024**3)}
_RUN = "recovered"
_RECOVERED_S = 300.0


class _DiskFloor:
    """Appends to a file, and has it on disk, as a program would that does nothing else."""

    def __init__(self, directory: str) -> None:
        self._descriptor = os.open(directory, os.O_WRONLY | os.O_TMPFILE, 0o600)

    def once(self, data: memoryview) -> float:
        """Seconds that it takes to write it."""
        began = time.perf_counter()
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fdatasync(self._descriptor)
        return time.perf_counter() - began

    def close(self) -> None:
        os.close(self._descriptor)


@contextmanager
def _directory(place: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="freestep-bench-", dir=place) as directory:
        yield directory


def _large(parameters: int, rounds: int) -> list[Figure]:
    """A large model's push + pull under both durabilities, and the floor."""
    times: list[tuple[float, float, float]] = []
    with ExitStack() as stack:
        directory = stack.enter_context(_directory(DISK))
        service = stack.enter_context(service_in(directory, **_SETTINGS))
        client = stack.enter_context(Client(service.url))
        checkpoint, journal = (
            stack.enter_context(Worker(new_run(client, f"large-{each}", parameters, durability=each)))
            for each in ("checkpoint", "journal")
        )
        floor = _DiskFloor(directory)
        stack.callback(floor.close)
        for _ in range(WARMUP + rounds):
            times.append((floor.once(journal.gradient.bytes), checkpoint.push(), journal.push()))
    times = times[WARMUP:]
    name = f"{parameters / 1e6:g}M"
    return [
        Figure.of(f"{name} floor: its bytes written and on disk", [1e3 * floor for floor, _, _ in times], "ms"),
        Figure.of(f"{name} push + pull, checkpoint", [1e3 * checkpoint for _, checkpoint, _ in times], "ms"),
        Figure.of(f"{name} push + pull, journal", [1e3 * journal for _, _, journal in times], "ms"),
        Figure.of(
            f"{name} push + pull, journal, of the larger of both",
            [journal / max(floor, checkpoint) for floor, checkpoint, journal in times],
            "×",
            most=MOST_TIME,
        ),
    ]


def _many(place: Path, title: str, windows: int, seconds: float) -> list[Figure]:
    """The pushes of many workers under both durabilities."""
    rates: list[tuple[float, float]] = []
    with ExitStack() as stack:
        directory = stack.enter_context(_directory(place))
        service = stack.enter_context(service_in(directory, **_SETTINGS))
        client = stack.enter_context(Client(service.url))
        checkpoint, journal = (
            stack.enter_context(Crew(service.url, new_run(client, each, SMALL, durability=each).name))
            for each in ("checkpoint", "journal")
        )
        for _ in range(1 + windows):
            rates.append((checkpoint.push(WORKERS, seconds).rate, journal.push(WORKERS, seconds).rate))
    name = f"{SMALL / 1e6:g}M, {WORKERS} workers, {title}"
    return [
        Figure.of(f"{name}: pushes, checkpoint", [checkpoint for checkpoint, _ in rates[1:]], "/s"),
        Figure.of(f"{name}: pushes, journal", [journal for _, journal in rates[1:]], "/s"),
        Figure.of(f"{name}: journal, of checkpoint", [ours / its for its, ours in rates[1:]], "×", least=LEAST_RATE),
    ]


@contextmanager
def _killed(directory: str) -> Iterator[Service]:
    """A service that is killed at the end, so that it leaves no checkpoint of what it was pushed last."""
    with service_in(directory, **_SETTINGS) as service:
        yield service
        os.kill(service.pid, signal.SIGKILL)


def _step(client: Client) -> int:
    """The run's step, once it goes on; the service may have to wait until the dead one's ownership ends."""
    deadline = time.perf_counter() + _RECOVERED_S
    while True:
        try:
            _, step = client.run(_RUN).pull()
            return step
        except FreestepError:
            if time.perf_counter() > deadline:
                raise
            time.sleep(0.01)


def _recovery(recoveries: int, seconds: float) -> tuple[list[Figure], list[str]]:
    """How fast a journal is read and applied, beside how fast its pushes came."""
    alone, counts, behind, rates = [], [], [], []
    with _directory(DISK) as directory:
        with _killed(directory) as service, Client(service.url) as client:
            with Worker(new_run(client, _RUN, SMALL, durability="journal")) as worker:
                worker.push()
        for _ in range(recoveries):
            began = time.perf_counter()
            with _killed(directory) as service, Client(service.url) as client:
                before = _step(client)
                alone.append(time.perf_counter() - began)
                client.run(_RUN).checkpoint()
                with Crew(service.url, _RUN) as crew:
                    window = crew.push(WORKERS, seconds)
                rates.append(window.rate)
            began = time.perf_counter()
            with _killed(directory) as service, Client(service.url) as client:
                counts.append(_step(client) - before)
                behind.append(time.perf_counter() - began)
                if counts[-1] != len(window.pushes):
                    raise RuntimeError(f"{len(window.pushes)} pushes were acknowledged, and {counts[-1]} are there")
                client.run(_RUN).checkpoint()
    start = median(alone)
    if min(behind) <= start:
        raise RuntimeError("a replay took no longer than a start takes by itself: push for longer")
    replayed = [count / (seconds - start) for count, seconds in zip(counts, behind, strict=True)]
    ratios = [ours / its for its, ours in zip(rates, replayed, strict=True)]
    name = f"{SMALL / 1e6:g}M"
    figures = [
        Figure.of(f"{name}: a start after a kill, with a push to replay", alone, "s"),
        Figure.of(f"{name}: ..., with all of {WORKERS} workers to replay", behind, "s"),
        Figure.of(f"{name}: pushes replayed", replayed, "/s"),
        Figure.of(f"{name}: pushes replayed, of the speed at which they came", ratios, "×", least=LEAST_REPLAY),
    ]
    return figures, [f"after a kill {median(counts):.0f} pushes were replayed"]


def report(options: Options) -> Report:
    large, rounds = (QUICK_LARGE, QUICK_ROUNDS) if options.quick else (LARGE, ROUNDS)
    windows, seconds = (QUICK_WINDOWS, QUICK_SECONDS) if options.quick else (WINDOWS, SECONDS)
    recoveries, sent = (QUICK_RECOVERIES, QUICK_REPLAYED_S) if options.quick else (RECOVERIES, REPLAYED_S)
    recovery, notes = _recovery(recoveries, sent)
    return Report(
        [
            *_large(large, rounds),
            *_many(MEMORY, "in memory", windows, seconds),
            *_many(DISK, "on a disk", windows, seconds),
            *recovery,
        ],
        [*notes, f"the journal is in {DISK} on a disk, and in {MEMORY} in memory; no checkpoint fell into a round"],
    )
