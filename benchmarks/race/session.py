"""What is not there yet of a plan is run, as long as there is time; each race is kept as soon as it is over."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.race.methods import METHODS
from benchmarks.race.one_race import Race
from benchmarks.race.places import Unavailable
from benchmarks.race.plan import AROUND_S, Entrant, Plan, in_order
from benchmarks.race.results import Results
from benchmarks.race.tuning import best_rate, tune
from benchmarks.race.worlds import WORLDS

__all__ = ["Session"]

Run = Callable[[Race, Path], Mapping[str, Any]]


class Session:
    """Runs races of a plan into results.

    data: the tasks' folder. run: as `one_race.run`. seconds: no race begins that would end later than that.
    """

    def __init__(self, plan: Plan, results: Results, data: Path, run: Run, seconds: float = inf) -> None:
        self._plan, self._results, self._data, self._run = plan, results, data, run
        self._began = time.monotonic()
        self._until = self._began + seconds
        self.failures: list[str] = []
        """Races that ended with an error."""
        self.is_complete = True
        """Whether the time sufficed."""

    def race(self, entrants: Sequence[Entrant]) -> None:
        able = [each for each in entrants if self._is_able(each)]
        try:
            for entrant, seed in in_order(self._plan, able):
                if entrant.name not in self._results.missing:
                    self._race(entrant, seed)
        except _OutOfTime:
            self.is_complete = False
            self._say("no time is left for another race: the same command goes on from here")

    def _is_able(self, entrant: Entrant) -> bool:
        why = METHODS[entrant.method].missing()
        if why is None:
            # Whatever kept it from being raced before may be over.
            self._results.missing.pop(entrant.name, None)
            return True
        self._leave_out(entrant, why)
        return False

    def _race(self, entrant: Entrant, seed: int) -> None:
        try:
            race = self._planned(entrant, seed, self._rate(*entrant.tuned_as))
            if self._results.has(race):
                return
            self._say(f"{entrant.name}, seed {seed}, learning rate {race.lr:g}, {race.seconds:g} s ...")
            found = self._raced(race)
        except Unavailable as reason:
            self._leave_out(entrant, str(reason))
            return
        except RuntimeError as error:
            self.failures.append(entrant.name)
            self._say(f"{entrant.name}, seed {seed} failed: {error}")
            self._leave_out(entrant, f"with seed {seed}, {str(error).splitlines()[0].rstrip(':')}")
            return
        self._results.put(race, found)
        _, gradients, loss, accuracy = found["curve"][-1]
        self._say(f"  {found['steps']} steps, {gradients} gradients, loss {loss:.3f}, accuracy {accuracy:.1%}")

    def _rate(self, task: str, method: str) -> float:
        """The method's learning rate, by trial in the world of equal workers where that was not done before."""
        grid = METHODS[method].grid
        if not self._plan.tunes:
            return grid[len(grid) // 2]
        entrant = Entrant("equal", method, task)
        return best_rate(tune(lambda lr: self._tried(self._planned(entrant, self._plan.tuning_seed, lr)), grid))

    def _tried(self, race: Race) -> float:
        loss = self._results.trial(race)
        if loss is None:
            loss = float(self._raced(race)["curve"][-1][2])
            self._results.put_trial(race, loss)
            self._say(f"tuning {race.method}/{race.task}: {race.lr:g} comes to {loss:.3f}")
        return loss

    def _raced(self, race: Race) -> Mapping[str, Any]:
        if time.monotonic() + AROUND_S + race.seconds > self._until:
            raise _OutOfTime
        return self._run(race, self._data)

    def _planned(self, entrant: Entrant, seed: int, lr: float) -> Race:
        plan, seconds = self._plan, self._plan.share * WORLDS[entrant.world].seconds
        return Race(entrant.world, entrant.method, entrant.task, seed, lr, plan.workers, seconds, plan.look_s)

    def _leave_out(self, entrant: Entrant, why: str) -> None:
        self._say(f"{entrant.name} is left out: {why}")
        self._results.put_missing(entrant.name, why)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", file=sys.stderr, flush=True)


class _OutOfTime(Exception):
    """The next race would end too late."""
