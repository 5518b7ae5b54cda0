"""Which races there are, in which order, which of them a command runs, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product

from benchmarks.race.methods import METHODS, TRIES
from benchmarks.race.tasks import TASKS
from benchmarks.race.worlds import WORLDS

__all__ = ["AROUND_S", "FULL", "QUICK", "Entrant", "Plan", "chosen", "estimated_s", "in_order", "tuned"]

AROUND_S = 7.0
"""Around a race, with nothing beside it: processes start, and what was seen is evaluated."""


@dataclass(frozen=True)
class Entrant:
    """A method in a world on a task, as `--only` names it."""

    world: str
    method: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.world}/{self.method}/{self.task}"

    @property
    def tuned_as(self) -> tuple[str, str]:
        """The task and the method whose learning rate it takes."""
        return self.task, METHODS[self.method].tuned_as or self.method


@dataclass(frozen=True)
class Plan:
    """How races are run.

    names: patterns of those that run where none is asked for, first what says most. seeds: of the races; a world takes
    as many of them as it says. tuning_seed: of the races that learning rates are chosen by, none of the others. tunes:
    whether rates are tried, or the middle of each grid is taken. share: of the worlds' seconds. look_s: between two
    looks.
    """

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    tunes: bool
    workers: int
    share: float
    look_s: float


FULL = Plan(
    (
        "equal/*/*",
        "slow-6/*/*",
        # The digits are learned before somebody is killed.
        "kills/*/characters",
        "drawn/*/digits",
        "slow-2/*/digits",
        "slow-20/*/digits",
        "link/*/digits",
        "fast/*/digits",
    ),
    # The first by which somebody is killed in every race of that world; the other worlds have no use for that.
    seeds=(0, 2, 3),
    tuning_seed=1,
    tunes=True,
    workers=4,
    share=1.0,
    look_s=0.5,
)
QUICK = Plan(
    ("equal/ddp/digits", "slow-6/ringmaster/digits"),
    seeds=(0,),
    tuning_seed=1,
    tunes=False,
    workers=2,
    share=0.1,
    look_s=0.2,
)


def chosen(plan: Plan, only: Sequence[str] = ()) -> list[Entrant]:
    """What is named: by WORLD what the plan has of it, by WORLD/METHOD/TASK, where * stands for any, all that there is.

    In the order of the names. Raises ValueError for a name that nothing has.
    """
    found: dict[Entrant, None] = {}
    for name in only or plan.names:
        named = [each for each in _known(plan, name) if fnmatchcase(each.name, name if "/" in name else f"{name}/*/*")]
        if not named:
            raise ValueError(f"nothing that can be raced is {name}: WORLD, or WORLD/METHOD/TASK as in slow-6/*/digits")
        found |= dict.fromkeys(named)
    return list(found)


def _known(plan: Plan, name: str) -> Iterable[Entrant]:
    return _all() if "/" in name else chosen(plan)


def _all() -> Iterator[Entrant]:
    for task, world, method in product(TASKS, WORLDS.values(), METHODS.values()):
        if method.races_in(world):
            yield Entrant(world.name, method.name, task)


def in_order(plan: Plan, entrants: Sequence[Entrant]) -> list[tuple[Entrant, int]]:
    """Entrants with their seeds: all with the first, then all with the next, so that a part says something of all."""
    return [
        (each, seed) for number, seed in enumerate(plan.seeds) for each in entrants if number < WORLDS[each.world].seeds
    ]


def tuned(entrants: Iterable[Entrant]) -> list[tuple[str, str]]:
    """The tasks and methods that need a learning rate."""
    return list(dict.fromkeys(each.tuned_as for each in entrants))


def estimated_s(plan: Plan, entrants: Sequence[Entrant]) -> float:
    """Seconds for all of it, with nothing beside it."""
    races = sum(AROUND_S + plan.share * WORLDS[each.world].seconds for each, _ in in_order(plan, entrants))
    tries = TRIES * len(tuned(entrants)) if plan.tunes else 0
    return races + tries * (AROUND_S + plan.share * WORLDS["equal"].seconds)
