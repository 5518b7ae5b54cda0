"""How a body holds its tensors: as they are, or encoded as fewer bytes than their elements have."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from freestep.errors import MalformedTensors
from freestep.wire.manifest import Manifest, Slot

__all__ = ["ENCODINGS", "INDICES", "INT8", "ITEMSIZE", "SCALE", "SIZES", "VALUES", "Encoding"]

ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes per element of the dtypes that travel."""

ENCODINGS = ("dense", "int8", "topk")
"""Of gradients."""
SCALE, VALUES, INDICES = "::scale", "::values", "::indices"
"""What follows a tensor's name where an encoding names something else of it."""

SIZES = {**ITEMSIZE, "I8": 1, "I32": 4, "I64": 8}
"""Bytes per element of all that a body may hold."""


@dataclass(frozen=True)
class Encoding:
    """How a body holds its tensors, as its metadata says.

    dense: a tensor `w` as it is. int8: `w` as I8, and `w::scale`, F32, one for each `block` elements of the flattened
    tensor (the last block may have fewer); an element is q · scale. topk: `w::values` and `w::indices`, I32 or I64, of
    k elements of the flattened tensor; the others are 0.
    """

    name: str = "dense"
    block: int = 256

    @classmethod
    def of(cls, metadata: Mapping[str, str], accepted: Collection[str]) -> Encoding:
        """What a body's metadata says. Raises MalformedTensors."""
        name = metadata.get("freestep.encoding", "dense")
        if name not in accepted:
            raise MalformedTensors(f"the encoding is not one of {', '.join(accepted)}", encoding=name)
        if name != "int8":
            return cls(name)
        block = metadata.get("freestep.block", str(cls.block))
        if not re.fullmatch(r"[1-9][0-9]{0,9}", block):
            raise MalformedTensors("freestep.block is not a number of elements", block=block)
        return cls(name, int(block))

    def metadata(self) -> dict[str, str]:
        """What the body says of itself."""
        if self.name == "dense":
            return {}
        block = {"freestep.block": str(self.block)} if self.name == "int8" else {}
        return {"freestep.encoding": self.name, **block}

    def roles(self, manifest: Manifest) -> dict[str, tuple[Slot, str]]:
        """The names in the header: whose each is, and what. Raises MalformedTensors where one stands for two things."""
        roles = {"dense": ("",), "int8": ("", SCALE), "topk": (VALUES, INDICES)}[self.name]
        names = {slot.name + role: (slot, role) for slot in manifest.slots for role in roles}
        if len(names) != len(roles) * len(manifest.slots):
            raise MalformedTensors(
                "the run has tensors whose names are those of other tensors' encodings", encoding=self.name
            )
        return names

    def dtypes(self, role: str) -> tuple[str, ...]:
        """What something may be of."""
        if role == "":
            return ("I8",) if self.name == "int8" else tuple(ITEMSIZE)
        return {SCALE: ("F32",), VALUES: tuple(ITEMSIZE), INDICES: ("I32", "I64")}[role]

    def shape(self, slot: Slot, role: str) -> tuple[int, ...] | None:
        """The shape that something has; None where the sender chooses k."""
        if role == SCALE:
            return (self.blocks(slot),)
        return slot.shape if role == "" else None

    def blocks(self, slot: Slot) -> int:
        """How many blocks a tensor has."""
        return -(-slot.numel // self.block)

    def int8_items(self, manifest: Manifest) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """What an int8 body holds, by name, dtype and shape, in the order in which it is made.

        The scales come first, so that they lie at multiples of 4 bytes.
        """
        for slot in manifest.slots:
            yield slot.name + SCALE, "F32", (self.blocks(slot),)
        for slot in manifest.slots:
            yield slot.name, "I8", slot.shape

    def stretches(self, slots: Sequence[Slot], most: int) -> Iterator[tuple[int, int, int]]:
        """The tensors' elements in stretches of whole blocks: begin, end, and how many elements a block has in it.

        They are in order, and of at most about `most` elements; tensors that are whole blocks are as one tensor.
        """
        most = max(most // self.block, 1) * self.block
        for begin, end, width in self._runs(slots):
            for place in range(begin, end, most):
                yield place, min(place + most, end), width

    def _runs(self, slots: Sequence[Slot]) -> Iterator[tuple[int, int, int]]:
        """As long stretches of blocks of one size as there are."""
        begin = end = slots[0].offset if slots else 0
        for slot in slots:
            whole = slot.numel - slot.numel % self.block
            end = slot.offset + whole
            if whole < slot.numel:
                if begin < end:
                    yield begin, end, self.block
                begin = slot.offset + slot.numel
                yield end, begin, begin - end
                end = begin
        if begin < end:
            yield begin, end, self.block


INT8 = Encoding("int8")
"""That of points."""
