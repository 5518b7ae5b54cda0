"""`freestep workers`: a run's live workers, once or again every second."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.live import Live

from freestep.api.models import WorkerStatus
from freestep.client import DEFAULT_URL
from freestep.commands.rates import Rates
from freestep.commands.shared import Json, RunName, Token, Url, connect, or_dash
from freestep.run import Run
from freestep.terminal import print_result, table

__all__ = ["COLUMNS", "Speeds", "rows", "workers"]

_EVERY_S = 1.0
COLUMNS = ("worker", "pushes", "last at step", "staleness", "steps/s", "outliers", "lease ends in")


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
    print_result(found, as_json, COLUMNS, rows(found))


def _watch(run: Run, as_json: bool) -> NoReturn:
    console, speeds = Console(), Speeds()
    in_place = console.is_terminal and not as_json
    with Live(console=console, auto_refresh=False) if in_place else nullcontext() as live:
        while True:
            found = speeds.complete(run.workers(), time.monotonic())
            if live is not None:
                live.update(table(COLUMNS, rows(found), console.width), refresh=True)
            elif as_json:
                sys.stdout.write(json.dumps([each.model_dump(mode="json") for each in found]) + "\n")
                sys.stdout.flush()
            else:
                print_result(found, False, COLUMNS, rows(found))
            time.sleep(_EVERY_S)


class Speeds:
    """How many steps a second each worker makes: as its pushes report, else its pushes over the last seconds."""

    def __init__(self) -> None:
        self._rates = Rates()

    def complete(self, found: Sequence[WorkerStatus], now: float) -> list[WorkerStatus]:
        """The workers with their `speed`, which is None for one that is seen for the first time.

        now: the time of the look, in seconds.
        """
        self._rates.keep(worker.worker for worker in found)
        # They are counted by lease: a worker with a new one begins anew.
        return [
            worker
            if worker.speed is not None
            else worker.model_copy(update={"speed": self._rates.measure(worker.worker, worker.pushes, now)})
            for worker in found
        ]


def rows(found: Sequence[WorkerStatus]) -> list[Sequence[object]]:
    """Workers as rows of a table with these columns."""
    return [
        (worker.worker, worker.pushes, or_dash(worker.step), or_dash(worker.staleness), or_dash(worker.speed),
         worker.outliers, f"{worker.expires_in_ms / 1000:.1f} s")
        for worker in found
    ]  # fmt: skip
