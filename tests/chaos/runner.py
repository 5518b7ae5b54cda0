"""Runs a schedule, and judges it; looks for a shorter one that fails as well."""

from __future__ import annotations

import heapq
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from chaos.checker import Rules, check
from chaos.coverage import windows
from chaos.history import History, read
from chaos.schedule import Schedule
from chaos.system import System

__all__ = ["Outcome", "run", "shortened"]

_BEFORE_HEALING_S = 0.3
_AFTER_HEALING_S = 0.7
_LONGEST_DOWN_S = 1.5
_MOST_LINES = 12


@dataclass(frozen=True)
class Outcome:
    """What became of a schedule."""

    schedule: Schedule
    faults: list[str]
    windows: Counter[str]
    pushes: int
    folder: Path
    took_s: float

    @property
    def summary(self) -> str:
        state = f"{len(self.faults)} objections" if self.faults else "sound"
        return f"seed {self.schedule.seed}: {self.pushes} pushes, {self.took_s:.1f} s, {state}"

    def __str__(self) -> str:
        lines = [f"{self.summary}: {self.schedule}", f"history: {self.folder / 'history'}"]
        lines += [f"  {fault}" for fault in self.faults[:_MOST_LINES]]
        if len(self.faults) > _MOST_LINES:
            lines.append(f"  and {len(self.faults) - _MOST_LINES} more")
        return "\n".join(lines)


def run(schedule: Schedule, folder: Path, bug: str = "") -> Outcome:
    """Carries a schedule out in a new folder, and checks what came of it."""
    began = time.monotonic()
    try:
        system = System(schedule, folder, bug)
        try:
            _carry_out(schedule, system)
            system.finish()
        finally:
            system.close()
        stuck = []
    except TimeoutError as error:
        stuck = [f"stuck: {error}"]
    took_s = time.monotonic() - began
    history = History.of(read(folder / "history"))
    rules = Rules(schedule.batch, schedule.shards, goes_back=schedule.durability != "journal")
    return Outcome(schedule, stuck + check(history, rules), windows(history), len(history.pushes), folder, took_s)


def _carry_out(schedule: Schedule, system: System) -> None:
    """Injects and mends faults at their times; processes that have died come back after a while."""
    chance, order = random.Random(schedule.seed), count()
    began = time.monotonic()
    due: list[tuple[float, int, Callable[[], None]]] = []

    def plan(at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(due, (at_s, next(order), act))

    for fault in schedule.faults:
        plan(fault.at_s, lambda fault=fault: system.inject(fault))  # type: ignore[misc]
        plan(fault.at_s + fault.for_s, lambda fault=fault: system.mend(fault))  # type: ignore[misc]
    ends = max([each.at_s + each.for_s for each in schedule.faults], default=0.5) + _BEFORE_HEALING_S
    down: set[object] = set()
    while True:
        now = time.monotonic() - began
        while due and due[0][0] <= now:
            heapq.heappop(due)[2]()
        for members, revive in ((system.services, system.revive), (system.workers, system.revive_worker)):
            for number, member in enumerate(members):
                if member.poll() is not None and member not in down:
                    down.add(member)
                    plan(now + chance.uniform(0, _LONGEST_DOWN_S), lambda number=number, revive=revive: revive(number))
        if now > ends and not due:
            break
        time.sleep(0.02)
    system.heal()
    time.sleep(_AFTER_HEALING_S)
    system.heal()


def shortened(outcome: Outcome, folder: Path, tries: int, bug: str = "") -> Outcome:
    """The outcome with the fewest faults that was found to fail, as the given one does.

    tries: how many schedules to run at most. Times differ from run to run, so a fault may be needed and not seem so.
    """
    shortest, index = outcome, 0
    while tries > 0 and index < len(shortest.schedule.faults):
        tries -= 1
        place = folder / f"without-{tries}"
        found = run(shortest.schedule.without({index}), place, bug)
        if found.faults:
            shortest = found
        else:
            index += 1
            shutil.rmtree(place, ignore_errors=True)
    return shortest
