"""The encodings of tensors in a body: dense, or in fewer bytes than the elements have."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from freestep.errors import MalformedTensors
from freestep.wire.manifest import Manifest, Slot

__all__ = ["ENCODINGS", "INDICES", "INT8", "ITEMSIZE", "SCALE", "SIZES", "VALUES", "Encoding"]

ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes per element of the dtypes of dense tensors."""

ENCODINGS = ("dense", "int8", "topk")
"""The encodings of gradients."""
SCALE, VALUES, INDICES = "::scale", "::values", "::indices"
"""The suffixes of a tensor's name for the parts of its encoding."""

SIZES = {**ITEMSIZE, "I8": 1, "I32": 4, "I64": 8}
"""Bytes per element of every dtype in bodies."""


@dataclass(frozen=True)
class Encoding:
    """The encoding of a body's tensors, which its metadata names.

    dense: a tensor `w` in F32, BF16 or F16. int8: `w` in I8, and `w::scale` in F32, one for each `block` elements of
    the flattened tensor (the last block may be shorter); an element is q · scale. topk: `w::values`, and `w::indices`
    in I32 or I64, of k elements of the flattened tensor; the others are 0.
    """

    name: str = "dense"
    block: int = 256

    @classmethod
    def of(cls, metadata: Mapping[str, str], accepted: Collection[str]) -> Encoding:
        """The encoding that a body's metadata names. Raises MalformedTensors if it is not one of `accepted`."""
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
        """The metadata of a body in this encoding."""
        if self.name == "dense":
            return {}
        block = {"freestep.block": str(self.block)} if self.name == "int8" else {}
        return {"freestep.encoding": self.name, **block}

    def roles(self, manifest: Manifest) -> dict[str, tuple[Slot, str]]:
        """The names in the header, with tensor and suffix. Raises MalformedTensors if two of them are the same."""
        roles = {"dense": ("",), "int8": ("", SCALE), "topk": (VALUES, INDICES)}[self.name]
        names = {slot.name + role: (slot, role) for slot in manifest.slots for role in roles}
        if len(names) != len(roles) * len(manifest.slots):
            raise MalformedTensors(
                "the run has tensors whose names are those of other tensors' encodings", encoding=self.name
            )
        return names

    def dtypes(self, role: str) -> tuple[str, ...]:
        """The dtypes that a part of a tensor, named by its suffix, can have."""
        if role == "":
            return ("I8",) if self.name == "int8" else tuple(ITEMSIZE)
        return {SCALE: ("F32",), VALUES: tuple(ITEMSIZE), INDICES: ("I32", "I64")}[role]

    def shape(self, slot: Slot, role: str) -> tuple[int, ...] | None:
        """The shape of a part of a tensor; None if the sender chooses k."""
        if role == SCALE:
            return (self.blocks(slot),)
        return slot.shape if role == "" else None

    def blocks(self, slot: Slot) -> int:
        """The number of blocks of a tensor."""
        return -(-slot.numel // self.block)

    def int8_items(self, manifest: Manifest) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of an int8 body's contents, in order; the scales come first, to be aligned."""
        for slot in manifest.slots:
            yield slot.name + SCALE, "F32", (self.blocks(slot),)
        for slot in manifest.slots:
            yield slot.name, "I8", slot.shape

    def stretches(self, slots: Sequence[Slot], most: int) -> Iterator[tuple[int, int, int]]:
        """The elements in ranges of blocks of one size: begin, end, and elements per block.

        Ranges are in order and have at most `most` elements, or one block; they can span tensors that consist of whole
        blocks.
        """
        most = max(most // self.block, 1) * self.block
        for begin, end, width in self._runs(slots):
            for place in range(begin, end, most):
                yield place, min(place + most, end), width

    def _runs(self, slots: Sequence[Slot]) -> Iterator[tuple[int, int, int]]:
        """The longest ranges of blocks of one size."""
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
"""The encoding of points."""
