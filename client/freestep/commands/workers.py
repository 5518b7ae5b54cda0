"""`freestep workers`: a run's live workers, once or again every second."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.live import Live

from freestep.api.models import WorkerStatus
from freestep.client import DEFAULT_URL
from freestep.commands.shared import Json, RunName, Token, Url, connect, or_dash
from freestep.run import Run
from freestep.terminal import print_result, table

__all__ = ["Speeds", "workers"]

_EVERY_S = 1.0
_WINDOW_S = 10.0
"""Seconds over which the speed of a worker is measured."""
_COLUMNS = ("worker", "pushes", "last at step", "staleness", "steps/s", "outliers", "lease ends in")


def workers(
    run: RunName,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show them again every second, with the speed of each, until Ctrl-C.")
    ] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """List a run's live workers."""
    with connect(url, token, patient=watch) as client:
        remote = client.run(run)
        if watch:
            _watch(remote, as_json)
        found = remote.workers()
    print_result(found, as_json, _COLUMNS, _rows(found))


def _watch(run: Run, as_json: bool) -> NoReturn:
    console, speeds = Console(), Speeds()
    in_place = console.is_terminal and not as_json
    with Live(console=console, auto_refresh=False) if in_place else nullcontext() as live:
        while True:
            found = speeds.complete(run.workers(), time.monotonic())
            if live is not None:
                live.update(table(_COLUMNS, _rows(found)), refresh=True)
            elif as_json:
                sys.stdout.write(json.dumps([each.model_dump(mode="json") for each in found]) + "\n")
                sys.stdout.flush()
            else:
                print_result(found, False, _COLUMNS, _rows(found))
            time.sleep(_EVERY_S)


class Speeds:
    """How many steps a second each worker makes: as its pushes report, else its pushes over the last seconds."""

    def __init__(self) -> None:
        self._looks: dict[str, deque[tuple[float, int]]] = {}

    def complete(self, found: Sequence[WorkerStatus], now: float) -> list[WorkerStatus]:
        """The workers with their `speed`, which is None for one that is seen for the first time.

        now: the time of the look, in seconds.
        """
        self._looks = {worker.worker: self._looks.get(worker.worker, deque()) for worker in found}
        return [
            worker if worker.speed is not None else worker.model_copy(update={"speed": self._measure(worker, now)})
            for worker in found
        ]

    def _measure(self, worker: WorkerStatus, now: float) -> float | None:
        looks = self._looks[worker.worker]
        if looks and worker.pushes < looks[-1][1]:
            # They are counted by lease, and it has a new one.
            looks.clear()
        looks.append((now, worker.pushes))
        while len(looks) > 2 and now - looks[1][0] >= _WINDOW_S:
            looks.popleft()
        begun, pushes = looks[0]
        return (worker.pushes - pushes) / (now - begun) if now > begun else None


def _rows(found: Sequence[WorkerStatus]) -> list[Sequence[object]]:
    return [
        (worker.worker, worker.pushes, or_dash(worker.step), or_dash(worker.staleness), or_dash(worker.speed),
         worker.outliers, f"{worker.expires_in_ms / 1000:.1f} s")
        for worker in found
    ]  # fmt: skip
