"""One run of one job: started, killed by a schedule, ended in order, and counted."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.goodput import torchrun
from benchmarks.goodput.accounting import Outcome, account, pushes_behind
from benchmarks.goodput.kills import SERVICE, Kill
from benchmarks.goodput.ledger import APPLIED, entries
from benchmarks.goodput.supervisor import Supervisor
from freestep import Client
from freestep.demo.data import load
from freestep.errors import FreestepError

__all__ = ["run_ddp", "run_freestep"]

_START_S = 120.0


def _run_schedule(
    supervisor: Supervisor,
    folder: Path,
    kills: Sequence[Kill],
    seconds: float,
    workers: int,
    kill: Callable[[int], None],
) -> tuple[float, list[Kill]]:
    """Waits until all workers push, then kills; returns the seconds that it took, and the kills as they were sent."""
    deadline = time.monotonic() + _START_S
    while {entry.worker for entry in entries(folder / "ledger") if entry.kind == APPLIED} != set(range(workers)):
        _checked(supervisor, folder)
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all workers push: see {folder / 'log'}")
        time.sleep(0.2)
    began, sent = time.monotonic(), []
    for each in kills:
        time.sleep(max(0.0, began + each.at - time.monotonic()))
        kill(each.victim)
        sent.append(Kill(time.monotonic(), each.victim))
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    return time.monotonic() - began, sent


def _checked(supervisor: Supervisor, folder: Path) -> None:
    if supervisor.failures:
        raise RuntimeError(f"{'; '.join(supervisor.failures)}: see {folder / 'log'}")


def run_freestep(
    durability: str,
    mean: float,
    kills: Sequence[Kill],
    *,
    seconds: float,
    workers: int,
    checkpoint_seconds: float,
    folder: Path,
) -> Outcome:
    """freestep's workers and a service with an embedded store."""
    load(folder / "digits.pt")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    supervisor = Supervisor(folder / "log", {"FREESTEP_CHECKPOINT_SECONDS": str(checkpoint_seconds)})
    serve = ["-m", "freestep.cli", "serve", "--port", str(port), "--data-dir", str(folder / "service")]
    place = [durability, str(folder / "digits.pt"), str(folder / "ledger")]
    started = [SERVICE]
    try:
        supervisor.keep(SERVICE, serve)
        with Client(url, retry_for=_START_S) as client:
            client.runs()
            for number in range(workers):
                supervisor.keep(number, ["-m", "benchmarks.goodput.worker", url, str(number), *place])
                started.append(number)
            took, sent = _run_schedule(supervisor, folder, kills, seconds, workers, supervisor.kill)
            _checked(supervisor, folder)
            final = _final_step(client)
        supervisor.end(started[1:])
        found = entries(folder / "ledger")
        # Pushes that were computed while the workers ended are not counted on either side.
        return account(f"freestep, {durability}", mean, took, found, sent, pushes_behind(found) + final)
    finally:
        supervisor.end(started)


def _final_step(client: Client) -> int:
    deadline = time.monotonic() + _START_S
    while True:
        with suppress(FreestepError):
            return client.run("goodput").status().step
        if time.monotonic() > deadline:
            raise RuntimeError("the run has no status")
        time.sleep(0.2)


def run_ddp(
    mean: float, kills: Sequence[Kill], *, seconds: float, workers: int, checkpoint_seconds: float, folder: Path
) -> Outcome:
    """A DDP job under torchrun. It has no service: the kills of that hit rank 0."""
    load(folder / "digits.pt")
    supervisor = Supervisor(folder / "log", torchrun.ENVIRONMENT)
    checkpoint, stop = folder / "checkpoint.pt", folder / "stop"
    script = [str(folder / "digits.pt"), str(folder / "ledger"), str(checkpoint), str(checkpoint_seconds), str(stop)]

    def kill(victim: int) -> None:
        torchrun.kill_rank(folder, max(victim, 0))

    try:
        supervisor.keep(0, torchrun.arguments(workers, "benchmarks.goodput.ddp", script))
        took, sent = _run_schedule(supervisor, folder, kills, seconds, workers, kill)
        _checked(supervisor, folder)
        stop.touch()
        supervisor.wait(0)
    finally:
        supervisor.end([0])
    found = entries(folder / "ledger")
    return account("DDP, torchrun", mean, took, found, sent, workers * _saved_step(checkpoint))


def _saved_step(checkpoint: Path) -> int:
    import torch

    return int(torch.load(checkpoint)["step"]) if checkpoint.exists() else 0
