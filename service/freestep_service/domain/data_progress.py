"""What Redis knows of a data set, as its status shows it; and the units behind numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from freestep.api.data import DataProgress, DataSpec, DataStatus, Holder, PassStatus, Unit
from freestep_service.domain.unit_order import UnitOrder

__all__ = ["DataView", "Out", "UnitCounts", "progress_of", "units_of"]

_MOST_PASSES = 100


class UnitCounts(NamedTuple):
    """How many units of a data set nobody has, workers have, and have counted, over all passes.

    open: None where the passes have no end.
    """

    name: str
    open: int | None
    out: int
    done: int

    @classmethod
    def of(cls, name: str, total: int | None, cursor: int, done: int, back: int) -> UnitCounts:
        """Of all units, the next that was never handed out, those that have counted, and those that came back."""
        out = cursor - done - back
        return cls(name, None if total is None else total - done - out, out, done)


@dataclass(frozen=True)
class Out:
    """A unit that a worker has. since_ms: by Redis's clock."""

    number: int
    worker: str
    since_ms: int


@dataclass(frozen=True)
class DataView:
    """A data set as Redis has it at `now_ms`.

    cursor: the next number that was never handed out. back: those that were, and that nobody has.
    """

    name: str
    spec: DataSpec
    cursor: int
    done: int
    now_ms: int
    out: Sequence[Out] = field(default_factory=tuple)
    back: Sequence[int] = field(default_factory=tuple)

    def status(self) -> DataStatus:
        """What its status shows."""
        spec, units = self.spec, self.spec.units
        out = Counter(each.number // units for each in self.out)
        back = Counter(number // units for number in self.back)
        current = self.cursor // units
        begun = sorted({*out, *back} | ({current} if self.cursor % units else set()))
        missing = {number: out[number] + back[number] for number in begun}
        if self.cursor % units:
            missing[current] += units - self.cursor % units
        passes = [
            PassStatus(
                of_pass=number, open=missing[number] - out[number], out=out[number], done=units - missing[number]
            )
            for number in begun
        ]
        return DataStatus(
            name=self.name,
            spec=spec,
            units=units,
            open=None if spec.total is None else spec.total - self.done - len(self.out),
            out=len(self.out),
            done=self.done,
            examples_done=self._examples_done(begun),
            exhausted=self.done == spec.total,
            passes_done=-(-self.cursor // units) - len(begun),
            passes=passes[:_MOST_PASSES],
            holders=list(self._holders()),
        )

    def _examples_done(self, begun: Iterable[int]) -> int:
        """All that have counted; the last unit of a pass may be shorter than the others."""
        spec, units = self.spec, self.spec.units
        missing = {*self.back, *(each.number for each in self.out)}
        lacking = units * spec.unit - spec.length
        # Of the passes that are not done, the last units that have counted.
        last = [number * units + _place_of(spec, number, units - 1) for number in begun]
        short = sum(number < self.cursor and number not in missing for number in last)
        short += -(-self.cursor // units) - len(last)
        return self.done * spec.unit - short * lacking

    def _holders(self) -> Iterable[Holder]:
        by_worker: dict[str, list[int]] = {}
        for each in self.out:
            by_worker.setdefault(each.worker, []).append(each.since_ms)
        for worker, since in sorted(by_worker.items()):
            yield Holder(worker=worker, units=len(since), oldest_ms=max(self.now_ms - min(since), 0))


def units_of(spec: DataSpec, numbers: Iterable[int]) -> list[Unit]:
    """The units of these numbers."""
    made = []
    for number in numbers:
        of_pass, place = divmod(number, spec.units)
        unit = place if spec.shuffle == "none" else _order(spec.units, spec.seed, of_pass).unit_at(place)
        begin = unit * spec.unit
        made.append(Unit(unit=number, of_pass=of_pass, begin=begin, end=min(begin + spec.unit, spec.length)))
    return made


def progress_of(run: Mapping[str, str]) -> dict[str, DataProgress]:
    """How much has counted of a run's data sets, of the run's fields in Redis."""
    made = {}
    for name in run.get("datasets", "").split():
        done, total = run[f"done:{name}"], run[f"total:{name}"]
        made[name] = DataProgress(done=int(done), total=int(total) if total else None, exhausted=done == total)
    return made


def _place_of(spec: DataSpec, of_pass: int, unit: int) -> int:
    return unit if spec.shuffle == "none" else _order(spec.units, spec.seed, of_pass).place_of(unit)


@lru_cache(maxsize=64)
def _order(units: int, seed: int, of_pass: int) -> UnitOrder:
    return UnitOrder(units, seed, of_pass)
