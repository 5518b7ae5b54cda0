"""Carrying a method over a run's flat vectors: one rule, three executions.

On the host a rule is compiled into a loop, which reads and writes each element of each vector once: a step is one pass
over memory. On a GPU it is compiled into a kernel, which does the same (`fused`). Where there is no kernel, and in
fp64, which tests take for the truth, torch evaluates the same function on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from freestep.manifest import Slot
from freestep_service.optimizers.compiled import compiled, inlined, is_compiled
from freestep_service.optimizers.fused import fuse
from freestep_service.optimizers.method import Buffers, Method, Scalars
from freestep_service.optimizers.slices import in_slices
from freestep_service.optimizers.streams import settle

__all__ = ["Segment", "gather", "initial_buffers", "segments", "step"]

CHUNK = 16 * 1024 * 1024
"""Elements that torch evaluates a rule on at a time: a rule's intermediate results are tensors of so many."""


@dataclass(frozen=True)
class Segment:
    """Elements `begin` to `end` of the flat vector, all of one param group."""

    group: str
    begin: int
    end: int


def segments(slots: Iterable[Slot]) -> tuple[Segment, ...]:
    """The param groups' stretches of the flat vector, as few as the manifest's order allows."""
    found = []
    for group, members in groupby(slots, key=lambda slot: slot.group):
        run = list(members)
        found.append(Segment(group, run[0].offset, run[-1].offset + run[-1].numel))
    return tuple(found)


def within(layout: Iterable[Segment], begin: int, end: int) -> Iterator[Segment]:
    """What of the segments lies in a slice."""
    for segment in layout:
        first, last = max(segment.begin, begin), min(segment.end, end)
        if first < last:
            yield Segment(segment.group, first, last)


def initial_buffers(method: Method, parameters: Tensor) -> dict[str, Tensor]:
    """The method's state before the first step; takes `parameters`, flat fp32 [numel], as its y."""
    made = {"y": parameters}
    for name in method.buffers:
        if name != "y":
            made[name] = parameters.clone() if name == "z" else torch.zeros_like(parameters)
    return made


def step(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    scalars: Mapping[str, Scalars],
    buffers: Buffers,
    gradient: Tensor,
    *,
    scale: float = 1.0,
    damping: float = 1.0,
) -> dict[str, Scalars]:
    """Moves the buffers, in place, one step along `scale * gradient`, and returns the groups' next scalars.

    `gradient` is flat fp32 [numel], as the buffers are.
    """
    advanced = {group: method.advance(hyperparameters[group], state, damping) for group, state in scalars.items()}
    coefficients = {group: chosen for group, (_, chosen) in advanced.items()}
    _sweep(method.rule, layout, coefficients, scale, gradient, [buffers[name] for name in method.buffers])
    return {group: following for group, (following, _) in advanced.items()}


class _None(NamedTuple):
    """The coefficients of rules that have none."""

    nothing: float = 0.0


def _take(g: Tensor, accumulated: Tensor, _: _None) -> tuple[Tensor]:
    return (g,)


def _add(g: Tensor, accumulated: Tensor, _: _None) -> tuple[Tensor]:
    return (accumulated + g,)


def gather(accumulated: Tensor, gradient: Tensor, share: float, *, first: bool) -> None:
    """Adds `share * gradient` to what was gathered before, in place; the first takes its place. Flat fp32 [numel]."""
    whole = [Segment("", 0, gradient.numel())]
    _sweep(_take if first else _add, whole, {"": _None()}, share, gradient, [accumulated])


def _sweep(
    rule: Callable[..., tuple[Tensor, ...]],
    layout: Iterable[Segment],
    coefficients: Mapping[str, Any],
    scale: float,
    gradient: Tensor,
    state: Sequence[Tensor],
) -> None:
    """Replaces the state, in place, by `rule(scale * gradient, *state, coefficients of the group)`.

    When it returns it is done, on a GPU too: the gradient's memory may be used for the next one.
    """
    if not is_compiled(gradient):
        for segment in layout:
            part = slice(segment.begin, segment.end)
            old = [vector[part] for vector in state]
            if not fuse(rule, coefficients[segment.group], scale, gradient[part], old):
                _evaluate(rule, coefficients[segment.group], scale, gradient[part], old)
        settle(gradient.device)
        return
    loop = _loop(rule, len(state))
    layout = tuple(layout)
    narrow = {group: _fp32(chosen) for group, chosen in coefficients.items()}
    vectors = [vector.numpy() for vector in (gradient, *state)]

    def work(begin: int, end: int) -> None:
        for segment in within(layout, begin, end):
            part = slice(segment.begin, segment.end)
            loop(np.float32(scale), *(vector[part] for vector in vectors), narrow[segment.group])

    in_slices(work, gradient.numel())


def _evaluate(
    rule: Callable[..., tuple[Tensor, ...]], coefficients: Any, scale: float, gradient: Tensor, state: Sequence[Tensor]
) -> None:
    """As `fuse`, by torch, operation by operation."""
    for begin in range(0, gradient.numel(), CHUNK):
        part = slice(begin, begin + CHUNK)
        old = [vector[part] for vector in state]
        for place, new in zip(old, rule(scale * gradient[part], *old, coefficients), strict=True):
            place.copy_(new)


def _fp32(coefficients: Any) -> Any:
    """The coefficients as the loops take them."""
    return type(coefficients)(*(value if isinstance(value, bool) else np.float32(value) for value in coefficients))


@cache
def _loop(rule: Callable[..., Any], vectors: int) -> Callable[..., None]:
    """The compiled loop of a rule over so many state vectors: (scale, gradient, *state, coefficients) -> None."""
    rule = inlined(rule)

    def one(scale: Any, g: Any, a: Any, s: Any) -> None:
        for i in range(g.size):
            (a[i],) = rule(scale * g[i], a[i], s)

    def two(scale: Any, g: Any, a: Any, b: Any, s: Any) -> None:
        for i in range(g.size):
            a[i], b[i] = rule(scale * g[i], a[i], b[i], s)

    def three(scale: Any, g: Any, a: Any, b: Any, c: Any, s: Any) -> None:
        for i in range(g.size):
            a[i], b[i], c[i] = rule(scale * g[i], a[i], b[i], c[i], s)

    loops: dict[int, Callable[..., None]] = {1: one, 2: two, 3: three}
    return compiled(loops[vectors], f"{rule.__module__}.{rule.__qualname__}")
