"""Which races there are, which of them a command runs, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product

from benchmarks.race.methods import METHODS
from benchmarks.race.tasks import TASKS
from benchmarks.race.worlds import WORLDS

__all__ = ["FULL", "QUICK", "Entrant", "Plan", "chosen", "estimated_s", "tuned"]

_AROUND_S = 7.0
"""Around a race: processes start, and what was seen is evaluated."""


@dataclass(frozen=True)
class Entrant:
    """A method in a world on a task, as `--only` names it."""

    world: str
    method: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.world}/{self.method}/{self.task}"


@dataclass(frozen=True)
class Plan:
    """How races are run.

    names: patterns of those that run where none is asked for. seeds: of the races. tuning_seed: of the races that
    learning rates are chosen by, none of the others. rates: of a method's grid, how many; of one alone nothing is
    tried. share: of the worlds' seconds. look_s: between two looks.
    """

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    rates: int
    workers: int
    share: float
    look_s: float


FULL = Plan(
    (
        *(f"{world.name}/*/digits" for world in WORLDS.values() if world.kill_mean is None),
        # The digits are learned before somebody is killed.
        *(f"{world}/*/characters" for world in ("equal", "slow-6", "kills")),
    ),
    # The first by which somebody is killed in every race of that world; the other worlds have no use for that.
    seeds=(0, 2, 3),
    tuning_seed=1,
    rates=4,
    workers=4,
    share=1.0,
    look_s=0.5,
)
QUICK = Plan(
    ("equal/ddp/digits", "slow-6/ringmaster/digits"),
    seeds=(0,),
    tuning_seed=1,
    rates=1,
    workers=2,
    share=0.1,
    look_s=0.2,
)


def chosen(plan: Plan, only: Sequence[str] = ()) -> list[Entrant]:
    """What fits one of the patterns WORLD/METHOD/TASK, where * stands for any. Raises ValueError if nothing does."""
    patterns = only or plan.names
    for pattern in patterns:
        if not any(fnmatchcase(each.name, pattern) for each in _all()):
            raise ValueError(f"nothing that can be raced is {pattern}: WORLD/METHOD/TASK, such as slow-6/*/digits")
    return [each for each in _all() if any(fnmatchcase(each.name, pattern) for pattern in patterns)]


def _all() -> Iterator[Entrant]:
    for task, world, method in product(TASKS, WORLDS.values(), METHODS.values()):
        if method.races_in(world):
            yield Entrant(world.name, method.name, task)


def tuned(entrants: Iterable[Entrant]) -> list[tuple[str, str]]:
    """The tasks and methods that need a learning rate."""
    return list(dict.fromkeys((each.task, METHODS[each.method].tuned_as or each.method) for each in entrants))


def estimated_s(plan: Plan, entrants: Sequence[Entrant]) -> float:
    """Seconds for all of it; one learning rate beyond each grid is counted."""
    races = sum(len(plan.seeds) * (_AROUND_S + plan.share * WORLDS[each.world].seconds) for each in entrants)
    trials = (plan.rates + 1) * len(tuned(entrants)) if plan.rates > 1 else 0
    return races + trials * (_AROUND_S + plan.share * WORLDS["equal"].seconds)
