"""Bodies in memory that both sides share: where one lies, as text, and copies into that memory and out of it."""

from __future__ import annotations

import ctypes
import re
from typing import NamedTuple, Self

__all__ = ["SPAN", "Span", "copy_bytes"]

SPAN = r"[0-9]{1,18}-[0-9]{1,18}"
"""What the text of a Span matches."""


class Span(NamedTuple):
    """Bytes `begin` to `end` of a memory, the last one excluded."""

    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError where the text is no span, or ends before it begins."""
        if re.fullmatch(SPAN, text) is None:
            raise ValueError
        begin, end = map(int, text.split("-"))
        if end < begin:
            raise ValueError
        return cls(begin, end)

    @property
    def length(self) -> int:
        """How many bytes these are."""
        return self.end - self.begin

    def __str__(self) -> str:
        return f"{self.begin}-{self.end}"


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copies all of `source` to `target`, of as many bytes. Other threads may run meanwhile, unless it is read-only."""
    if source.readonly:
        target[:] = source
    elif len(source) == len(target) > 0:
        ctypes.memmove(_address(target), _address(source), len(source))
    elif len(source) != len(target):
        raise ValueError(f"{len(source)} bytes do not fill {len(target)}")


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
