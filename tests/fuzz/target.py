"""What a fuzz target is, and how inputs are made of valid ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from hypothesis import strategies as st

__all__ = ["TARGETS", "Target", "mutants", "target_of"]

TARGETS = ("claims", "connection", "documents", "encodings", "hosts", "states", "tensors", "tokens")
"""Modules of this package, each of which has a TARGET."""


@dataclass(frozen=True)
class Target:
    """A part of the service that reads what anybody may send.

    check: takes any bytes, and raises only on a fault. seeds: inputs to begin with. words: what inputs consist of.
    inputs: a strategy that knows how they are made.
    """

    check: Callable[[bytes], None]
    seeds: Sequence[bytes]
    words: Sequence[bytes]
    inputs: st.SearchStrategy[bytes]


def target_of(name: str) -> Target:
    """The target of a module of this package."""
    target: Target = import_module(f"fuzz.{name}").TARGET
    return target


@st.composite
def _mutants(draw: st.DrawFn, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    mutant = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(mutant)))
        end = begin + draw(st.integers(0, 8))
        mutant[begin:end] = draw(st.binary(max_size=8) | st.sampled_from(words))
    return bytes(mutant)


def mutants(seeds: Sequence[bytes], words: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Seeds in which a few stretches were replaced, by words or by anything."""
    return _mutants(seeds, words)
