"""One race: processes are started, all begin at one moment, some are killed, x is looked at, and all are ended."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.goodput import torchrun
from benchmarks.goodput.kills import SERVICE, Kill
from benchmarks.goodput.ledger import APPLIED, COMPUTED, Entry, entries
from benchmarks.goodput.supervisor import Supervisor
from benchmarks.race.looks import looks, moments
from benchmarks.race.methods import METHODS
from benchmarks.race.places import Place, opened_place
from benchmarks.race.tasks import TASKS, Task
from benchmarks.race.told import Told, begin_at, is_ready
from benchmarks.race.worker import RUN
from benchmarks.race.worlds import WORLDS
from freestep import Client
from freestep.errors import FreestepError

__all__ = ["Race", "run"]

_START_S = 120.0
_SOON_S = 0.3
"""Between the word that it begins and the beginning: all are looking for it."""
_PATIENCE_S = 2.0

Weights = Mapping[str, Tensor]
Seen = list[Weights | None]


@dataclass(frozen=True)
class Race:
    """One method in one world, on one task, by one seed."""

    world: str
    method: str
    task: str
    seed: int
    lr: float
    workers: int
    seconds: float
    look_s: float


def run(race: Race, data: Path) -> dict[str, Any]:
    """Runs it; data: the tasks' folder. Raises Unavailable, and RuntimeError with what processes have said.

    Returns `curve`, of each look the seconds since the start, the gradients that were computed until then, loss and
    accuracy; `load`, of the machine before it; `ready_s`, seconds from the start of the processes until all are ready;
    `behind_s`, the most that a look or a kill was over after its moment; `steps`, of the optimizer; `computed`,
    gradients; `late`, the share of them whose computing took longer than the device's time; `kills`.
    """
    world = WORLDS[race.world]
    task, load = TASKS[race.task](data), os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory(prefix="freestep-race-") as name,
        opened_place(world.is_linked, race.workers) as at,
    ):
        folder = Path(name)
        with _processes(race, at, folder, data) as (supervisor, sight, kill):
            began_start = time.monotonic()
            _await_ready(supervisor, folder, race.workers)
            ready_s = time.monotonic() - began_start
            began = time.monotonic() + _SOON_S
            begin_at(folder, began)
            kills = world.kills(race.seed, race.seconds, race.workers)
            seen, behind_s = _follow(race, began, kills, kill, sight)
            _check(supervisor, folder)
        found = [each for each in entries(folder / "ledger") if each.at <= began + race.seconds]
        seen = seen or list(looks(folder, moments(race.seconds, race.look_s)))
    around = {"load": round(load, 2), "ready_s": round(ready_s, 2), "behind_s": round(behind_s, 3), "kills": len(kills)}
    return around | _outcome(race, task, found, began, seen)


def _check(supervisor: Supervisor, folder: Path) -> None:
    if supervisor.failures:
        raise RuntimeError(f"{'; '.join(supervisor.failures)}:\n{(folder / 'log').read_text()[-6000:]}")


def _await_ready(supervisor: Supervisor, folder: Path, workers: int) -> None:
    deadline = time.monotonic() + _START_S
    while not is_ready(folder, workers):
        _check(supervisor, folder)
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all workers get ready:\n{(folder / 'log').read_text()[-6000:]}")
        time.sleep(0.02)


Sight = Callable[[], Weights]
"""Pulls x now."""
Parts = tuple[Supervisor, Sight | None, Callable[[int], None]]
"""The processes; how x is looked at from here, None where a worker looks at its own; how a worker is killed."""


@contextmanager
def _processes(race: Race, at: Place, folder: Path, data: Path) -> Iterator[Parts]:
    supervisor = Supervisor(folder / "log", {**torchrun.ENVIRONMENT, **at.environment})
    started: list[int] = []

    def start(number: int, arguments: Sequence[str], where: int | None) -> None:
        supervisor.keep(number, arguments, at.before(where))
        started.append(number)

    def start_workers(module: str, meeting: str) -> None:
        for number in range(race.workers):
            start(number, ["-m", module, _told(race, at, folder, data, number, meeting).text()], number)

    kind = METHODS[race.method].kind
    try:
        if kind == "ddp":
            # Rank 0 is whom the others meet.
            start_workers("benchmarks.race.ddp_rank", f"{at.address(0)}:{at.port(0)}")
            yield supervisor, None, supervisor.kill
        elif kind == "torchrun":
            told = _told(race, at, folder, data, 0, "").text()
            start(0, torchrun.arguments(race.workers, "benchmarks.race.ddp_rank", [told]), None)
            yield supervisor, None, lambda rank: torchrun.kill_rank(folder, rank)
        elif kind == "torchft":
            port = at.port(None)
            start(SERVICE, ["-m", "benchmarks.race.lighthouse", str(port)], None)
            start_workers("benchmarks.race.torchft_replica", f"{at.address(None)}:{port}")
            yield supervisor, None, supervisor.kill
        else:
            address, port = at.address(None), at.port(None)
            serve = ["serve", "--host", address, "--port", str(port), "--data-dir", str(folder / "service")]
            start(SERVICE, ["-m", "freestep.cli", *serve], None)
            # They wait for it.
            start_workers("benchmarks.race.worker", f"{address}:{port}")
            with at.watching(), Client(f"http://{address}:{port}") as client:
                yield supervisor, lambda: client.run(RUN).pull("x")[0], supervisor.kill
    finally:
        # What a worker would do at its end is of no use any more; torchrun ends its ranks, and a service its store.
        supervisor.end(started, at_once=[] if kind == "torchrun" else [each for each in started if each != SERVICE])


def _told(race: Race, at: Place, folder: Path, data: Path, number: int, meeting: str) -> Told:
    return Told(
        race.method,
        race.world,
        race.task,
        race.seed,
        race.lr,
        number,
        race.workers,
        str(folder),
        str(data),
        race.seconds,
        race.look_s,
        at.address(number),
        meeting,
    )


def _follow(
    race: Race, began: float, kills: Sequence[Kill], kill: Callable[[int], None], sight: Sight | None
) -> tuple[Seen, float]:
    """Waits until it is over, and meanwhile kills workers, and looks if that is to be done from here.

    Returns what was seen, and the most seconds that anything was done after its moment.
    """
    due: list[tuple[float, int | None]] = [(each.at, each.victim) for each in kills]
    due += [(at, None) for at in moments(race.seconds, race.look_s)]
    seen: Seen = []
    behind_s = 0.0
    for at, victim in sorted(due, key=lambda each: each[0]):
        time.sleep(max(0.0, began + at - time.monotonic()))
        if victim is not None:
            kill(victim)
        elif sight is not None:
            seen.append(_seen(sight))
        behind_s = max(behind_s, time.monotonic() - began - at)
    return seen, behind_s


def _seen(sight: Sight) -> Weights:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return sight()
        except FreestepError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _outcome(race: Race, task: Task, found: Sequence[Entry], began: float, seen: Seen) -> dict[str, Any]:
    computed = [each for each in found if each.kind == COMPUTED]
    # Of a gradient, `step` says whether it was there in the device's time.
    late = sum(each.step == 0 for each in computed)
    steps = [each.step for each in found if each.kind == APPLIED]
    first = {name: each.detach() for name, each in task.model(race.seed).named_parameters()}
    curve = [[0.0, 0, *_digits(task.worth(first))]]
    for at, weights in zip(moments(race.seconds, race.look_s), seen, strict=True):
        gradients = sum(each.at <= began + at for each in computed)
        curve.append([at, gradients, *_digits(task.worth(first if weights is None else weights))])
    return {
        "steps": max(steps, default=0),
        "computed": len(computed),
        "late": round(late / max(1, len(computed)), 4),
        "curve": curve,
    }


def _digits(worth: tuple[float, float]) -> list[float]:
    return [round(each, 5) for each in worth]
