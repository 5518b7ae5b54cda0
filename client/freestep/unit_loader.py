"""Batches of a data set whose units a run hands out, made by a DataLoader."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Sampler

from freestep.errors import FreestepError
from freestep.unit_source import UnitSource
from freestep.unit_stock import StockedUnit

__all__ = ["UnitLoader"]


@dataclass(frozen=True)
class _Drawn:
    """A batch whose indices were drawn: the lease of its units, those whose last examples are in it, and whether None
    was made of it."""

    lease: str
    finished: list[StockedUnit]
    is_empty: bool = False


class UnitLoader:
    """An iterable of batches, from `Units.loader`.

    A DataLoader draws the indices of its batches in this process and delivers batches in that order. So the units of
    batches that worker processes have in work are a queue, and nothing has to travel with the data.

    Args:
        units: Hands out the units.
        dataset: A map-style dataset.
        batch_size: As for `Units.loader`.
        ahead: As for `Units.loader`.
        options: As for DataLoader.
    """

    def __init__(
        self, units: UnitSource, dataset: Any, batch_size: int, ahead: int, options: Mapping[str, Any]
    ) -> None:
        unit = units.spec.unit
        if not isinstance(batch_size, int) or batch_size < 1:
            raise FreestepError(f"batch_size must be a number of examples from 1, not {batch_size!r}")
        if batch_size > unit and batch_size % unit:
            raise FreestepError(f"a batch of {batch_size} is not of whole units of {unit}: take a multiple, or less")
        if not isinstance(ahead, int) or ahead < 0:
            raise FreestepError(f"ahead must be a number of batches from 0, not {ahead!r}")
        if isinstance(dataset, IterableDataset) or not all(hasattr(dataset, it) for it in ("__len__", "__getitem__")):
            raise FreestepError("an iterable dataset has no items by index: iterate over the units themselves")
        if len(dataset) != units.spec.length:
            raise FreestepError(
                f"the dataset has {len(dataset)} examples, and the units of {units.name!r} {units.spec.length}"
            )
        if not options.get("in_order", True):
            raise FreestepError("in_order=False is not possible: which units a batch has is known by its place")
        self._units = units
        self.ahead = ahead
        """How many batches the loop takes before it trains on them, where it does not say when it begins one."""
        self._loops = 0
        """How many have begun: the newest one has what was drawn."""
        self._taken = deque[_Drawn]()
        """The batches that the newest loop has taken and not begun, in order."""
        self._is_in_unit = False
        """Whether the batch that was begun last is not the last one of its unit."""
        self._sampler = _Batches(units, batch_size)
        persistent = {"persistent_workers": True} if options.get("num_workers") else {}
        self._loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=self._sampler, **{**persistent, **options})

    def is_exhausted(self) -> bool:
        """Whether all units of all passes have counted by now; asks the service unless that is known."""
        return self._units.is_exhausted()

    def begin_next(self) -> None:
        """Notes that the loop begins the oldest batch that it has taken; one that is None, it leaves out."""
        while self._taken:
            now = self._taken.popleft()
            self._note(now)
            if not now.is_empty:
                return

    def __iter__(self) -> Iterator[Any]:
        # What was left of a loop that is not over: an exception's traceback may keep it.
        self._leave()
        self._units.begin()
        self._loops += 1
        loop = self._loops
        drawn, taken, all_taken = self._sampler.drawn, deque[_Drawn](), False
        self._taken = taken
        ahead = math.inf if self._units.has_begin_told else self.ahead
        try:
            while True:
                for batch in self._loader:
                    now = drawn.popleft()
                    if now.lease != self._units.lease:
                        # Its units are others' by now.
                        continue
                    taken.append(replace(now, is_empty=batch is None))
                    if len(taken) > ahead:
                        self._note(taken.popleft())
                    yield batch
                    if loop != self._loops:
                        return
                if taken and self._units.has_begin_told:
                    # They are yet to be begun, and others may wait for their units.
                    all_taken = True
                    return
                while taken:
                    self._note(taken.popleft())
                if not self._units.await_more():
                    return
        finally:
            if loop == self._loops and not all_taken:
                self._leave()

    def _leave(self) -> None:
        """Gives back the units that were not finished, and leaves no gradients of a part of one to be pushed."""
        if self._is_in_unit:
            self._units.note_cut()
        self._is_in_unit = False
        self._units.give_back(self._sampler.forget())

    def _note(self, now: _Drawn) -> None:
        self._units.note(now.finished)
        self._is_in_unit = not now.finished
        for each in now.finished:
            self._sampler.unfinished.pop(each.unit.unit, None)


class _Batches(Sampler[list[int]]):
    """Draws the indices of batches. It ends where no unit is to be had now, so that what is drawn is delivered."""

    def __init__(self, units: UnitSource, batch_size: int) -> None:
        self.drawn: deque[_Drawn] = deque()
        """The batches that are drawn and not delivered, in order."""
        self.unfinished: dict[int, StockedUnit] = {}
        """The units of these, and those that the training loop has a part of, by number."""
        self._units = units
        self._batch_size = batch_size
        self._of_batch = max(batch_size // units.spec.unit, 1)

    def forget(self) -> list[StockedUnit]:
        """Forgets what was not delivered; returns its units."""
        left = list(self.unfinished.values())
        self.drawn.clear()
        self.unfinished.clear()
        return left

    def __iter__(self) -> Iterator[list[int]]:
        # Of an iteration that was broken off.
        self.drawn.clear()
        while group := self._group():
            lease = group[0].lease.lease
            self.unfinished |= {each.unit.unit: each for each in group}
            indices = [index for each in group for index in self._examples(each)]
            for begin in range(0, len(indices), self._batch_size):
                is_last = begin + self._batch_size >= len(indices)
                self.drawn.append(_Drawn(lease, group if is_last else []))
                yield indices[begin : begin + self._batch_size]

    def _group(self) -> list[StockedUnit]:
        """The units of one batch, or the one that is cut into several, of one lease."""
        group: list[StockedUnit] = []
        while len(group) < self._of_batch and (stocked := self._units.take()) is not None:
            if group and group[0].lease.lease != stocked.lease.lease:
                group.clear()
            group.append(stocked)
        return group

    def _examples(self, stocked: StockedUnit) -> list[int]:
        spec, unit = self._units.spec, stocked.unit
        examples = list(range(unit.begin, unit.end))
        if spec.shuffle != "none":
            random.Random(f"{spec.seed}:{unit.unit}").shuffle(examples)
        return examples
