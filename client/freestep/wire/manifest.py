"""A run's tensors in order, and their places in the flat vector of all of them, or in a shard's part of it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Self, TypeVar, TypeVarTuple, cast

from freestep.api.models import ParameterSpec, RunSpec

__all__ = ["Manifest", "Slot"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_TOLERANCE = 0.02
"""How far a boundary between shards may move to the end of a row, as a fraction of a shard's size."""


@dataclass(frozen=True)
class Slot:
    """A tensor's place in the flat vector: elements `offset` to `offset + numel`.

    In a shard's manifest it may be a part of a tensor: `start` is then where the part begins in the flattened
    tensor, and its shape is [rows, ...] where it is whole rows, else [numel].
    """

    name: str
    shape: tuple[int, ...]
    group: str
    offset: int
    numel: int
    start: int = 0


class Manifest:
    """A run's tensors in order, as slots of a flat vector of `numel` elements.

    A shard's manifest, from `part`, contains elements `begin` to `end` of the whole model's flat vector.
    """

    def __init__(self, parameters: Iterable[ParameterSpec], whole: Collection[str] = ()) -> None:
        """whole: the groups whose tensors are not divided between shards."""
        slots: list[Slot] = []
        offset = 0
        self._whole = frozenset(whole)
        for parameter in parameters:
            numel = prod(parameter.shape)
            slots.append(Slot(parameter.name, parameter.shape, parameter.group, offset, numel))
            offset += numel
        self._assemble(slots, 0, offset)

    @classmethod
    def of(cls, spec: RunSpec) -> Self:
        """The manifest of a run."""
        return cls(spec.parameters, spec.whole_groups())

    def _assemble(self, slots: Iterable[Slot], begin: int, end: int) -> None:
        self.slots = tuple(slots)
        self.by_name = {slot.name: slot for slot in self.slots}
        self._offsets = [slot.offset for slot in self.slots]
        self.begin, self.end = begin, end
        self.numel = end - begin
        self._derived: dict[tuple[Any, ...], Any] = {}

    def part(self, index: int, count: int) -> Manifest:
        """The manifest of shard `index` of `count`, with about `numel / count` elements; of one shard, this manifest.

        Boundaries are between tensors or rows if a row's end is near enough, else within a row. A tensor that is not
        divided goes to the shard that would have had the larger part of it.
        """
        begin, end = self._cut(index, count), self._cut(index + 1, count)
        if (begin, end) == (0, self.numel):
            return self
        made = Manifest(())
        made._assemble(self._slices(begin, end), begin, end)
        return made

    def _cut(self, index: int, count: int) -> int:
        """The first element of shard `index`; rows end at multiples of a tensor's trailing dimensions."""
        ideal = self.numel * index // count
        if ideal in (0, self.numel):
            return ideal
        # The last of those that begin there: empty tensors stand before the one that has the element.
        slot = self.slots[bisect_right(self._offsets, ideal) - 1]
        if slot.group in self._whole:
            return min(slot.offset, slot.offset + slot.numel, key=lambda place: abs(place - ideal))
        row = prod(slot.shape[1:])
        below = ideal - (ideal - slot.offset) % row
        nearest = min((below, min(below + row, self.numel)), key=lambda place: abs(place - ideal))
        return nearest if abs(nearest - ideal) <= _TOLERANCE * self.numel / count else ideal

    def _slices(self, begin: int, end: int) -> Iterator[Slot]:
        # The one before the first that begins in the part may reach into it.
        near = slice(max(bisect_left(self._offsets, begin) - 1, 0), bisect_right(self._offsets, end))
        for slot in self.slots[near]:
            first, last = max(slot.offset, begin), min(slot.offset + slot.numel, end)
            # An empty tensor belongs to the shard that contains its offset, at the very end to the last one.
            is_here = begin <= slot.offset < end or slot.offset == end == self.numel
            if first >= last and not (slot.numel == 0 and is_here):
                continue
            numel, start = last - first, first - slot.offset
            shape, row = slot.shape, prod(slot.shape[1:])
            if numel != slot.numel:
                is_rows = start % row == 0 and numel % row == 0
                shape = (numel // row, *slot.shape[1:]) if is_rows else (numel,)
            yield Slot(slot.name, shape, slot.group, first - begin, numel, start)

    def derived(self, make: Callable[[Manifest, *Ts], T], *arguments: *Ts) -> T:
        """`make(self, *arguments)`, computed once for each function and arguments."""
        key = (make, *arguments)
        if key not in self._derived:
            self._derived[key] = make(self, *arguments)
        return cast(T, self._derived[key])
