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
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from freestep.wire.manifest import Slot
from freestep_service.optimizers.kernels.compiled import compiled, inlined, is_compiled
from freestep_service.optimizers.kernels.fused import fuse
from freestep_service.optimizers.kernels.gradient import Gradient, Pushed, element
from freestep_service.optimizers.kernels.slices import in_slices
from freestep_service.optimizers.kernels.streams import settle
from freestep_service.optimizers.kernels.sums import gradient_sums
from freestep_service.optimizers.method import PLAIN, Buffers, Conditions, Method, Scalars, each_number

__all__ = ["Segment", "gather", "initial_buffers", "segments", "step"]

CHUNK = 16 * 1024 * 1024
"""Elements that torch evaluates a rule on at a time: a rule's intermediate results are tensors of so many."""


@dataclass(frozen=True)
class Segment:
    """Elements `begin` to `end` of the flat vector, all of one param group; the shapes of the tensors that they are."""

    group: str
    begin: int
    end: int
    shapes: tuple[tuple[int, ...], ...] = ()


def segments(slots: Iterable[Slot]) -> tuple[Segment, ...]:
    """The param groups' stretches of the flat vector, as few as the manifest's order allows."""
    found = []
    for group, members in groupby(slots, key=lambda slot: slot.group):
        run = list(members)
        shapes = tuple(slot.shape for slot in run)
        found.append(Segment(group, run[0].offset, run[-1].offset + run[-1].numel, shapes))
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
            made[name] = parameters.clone() if name in ("x", "z") else torch.zeros_like(parameters)
    return made


def step(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    scalars: Mapping[str, Scalars],
    buffers: Buffers,
    gradient: Gradient,
    taken: Conditions = PLAIN,
) -> dict[str, Scalars]:
    """Moves the buffers, in place, one step along the gradient, and returns the groups' next scalars."""
    if method.needs_sums:
        l1, inner = gradient_sums(gradient, buffers["z"], buffers["x"])
        taken = taken._replace(l1=l1, inner=inner)
    advanced = {group: method.advance(hyperparameters[group], state, taken) for group, state in scalars.items()}
    coefficients = {group: chosen for group, (_, chosen) in advanced.items()}
    state = [buffers[name] for name in method.buffers]
    for segments, along in _directed(method, layout, hyperparameters, gradient, state):
        _sweep(method.rule, segments, coefficients, along, state)
    return {group: following for group, (following, _) in advanced.items()}


def _directed(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    gradient: Gradient,
    state: Sequence[Tensor],
) -> Iterator[tuple[Iterable[Segment], Gradient]]:
    """What each segment's rule is to be given as its gradient."""
    if method.direction is None:
        yield layout, gradient
        return
    plain, matrices, made = [], [], torch.empty_like(state[0])
    for segment in layout:
        direction = method.direction(hyperparameters[segment.group])
        if direction is None:
            plain.append(segment)
            continue
        matrices.append(segment)
        begin = segment.begin
        for shape in segment.shapes:
            part = slice(begin, begin := begin + prod(shape))
            g = gradient.part(part).evaluated(made.dtype)
            kept = [vector[part].view(shape) for vector in state[2:]]
            made[part].view(shape).copy_(direction(g.view(shape), *kept))
    yield plain, gradient
    yield matrices, Gradient(made)


class _None(NamedTuple):
    """The coefficients of rules that have none."""

    nothing: float = 0.0


def _take(g: Tensor, accumulated: Tensor, _: _None) -> tuple[Tensor]:
    return (g,)


def _add(g: Tensor, accumulated: Tensor, _: _None) -> tuple[Tensor]:
    return (accumulated + g,)


def gather(accumulated: Tensor, pushed: Pushed, share: float, *, first: bool) -> None:
    """Adds `share * pushed` to what was gathered before, in place; the first takes its place. Flat [numel]."""
    whole = [Segment("", 0, pushed.numel())]
    _sweep(_take if first else _add, whole, {"": _None()}, Gradient(pushed, share=share), [accumulated])


def _sweep(
    rule: Callable[..., tuple[Tensor, ...]],
    layout: Iterable[Segment],
    coefficients: Mapping[str, Any],
    gradient: Gradient,
    state: Sequence[Tensor],
) -> None:
    """Replaces the state, in place, by `rule(gradient, *state, coefficients of the group)`.

    When it returns it is done, on a GPU too: the gradient's memory may be used for the next one.
    """
    if not is_compiled(state[0]):
        for segment in layout:
            part = slice(segment.begin, segment.end)
            own = rule, coefficients[segment.group], gradient.part(part), [vector[part] for vector in state]
            if not fuse(*own):
                _evaluate(*own)
        settle(state[0].device)
        return
    loop = _loop(rule, len(state), gradient.dtype, gradient.gathered is not None)
    layout = tuple(layout)
    narrow = {group: each_number(np.float32, chosen) for group, chosen in coefficients.items()}
    scale, share = np.float32(gradient.scale), np.float32(gradient.share)
    vectors = [vector.numpy() for vector in state]

    def work(begin: int, end: int) -> None:
        for segment in within(layout, begin, end):
            for part, pushed, gathered in gradient.pieces(segment.begin, segment.end):
                loop(scale, share, pushed, gathered, *(vector[part] for vector in vectors), narrow[segment.group])

    in_slices(work, gradient.pushed.numel())


def _evaluate(
    rule: Callable[..., tuple[Tensor, ...]], coefficients: Any, gradient: Gradient, state: Sequence[Tensor]
) -> None:
    """As `fuse`, by torch, operation by operation."""
    for begin in range(0, gradient.pushed.numel(), CHUNK):
        part = slice(begin, begin + CHUNK)
        old = [vector[part] for vector in state]
        new = rule(gradient.part(part).evaluated(old[0].dtype), *old, coefficients)
        for place, moved in zip(old, new, strict=True):
            place.copy_(moved)


@cache
def _loop(rule: Callable[..., Any], vectors: int, dtype: torch.dtype, gathered: bool) -> Callable[..., None]:
    """The compiled loop of a rule over so many state vectors, for gradients that come as `dtype`.

    It is (scale, share, pushed, gathered, *state, coefficients) -> None, of the elements of `Gradient.pieces`.
    """
    name = f"{rule.__module__}.{rule.__qualname__}.{dtype}.{'group' if gathered else 'one'}"
    rule, gradient = inlined(rule), element(dtype, gathered=gathered)

    def one(scale: Any, share: Any, g: Any, h: Any, a: Any, s: Any) -> None:
        for i in range(g.size):
            (a[i],) = rule(gradient(scale, share, g[i], h[i]), a[i], s)

    def two(scale: Any, share: Any, g: Any, h: Any, a: Any, b: Any, s: Any) -> None:
        for i in range(g.size):
            a[i], b[i] = rule(gradient(scale, share, g[i], h[i]), a[i], b[i], s)

    def three(scale: Any, share: Any, g: Any, h: Any, a: Any, b: Any, c: Any, s: Any) -> None:
        for i in range(g.size):
            a[i], b[i], c[i] = rule(gradient(scale, share, g[i], h[i]), a[i], b[i], c[i], s)

    def four(scale: Any, share: Any, g: Any, h: Any, a: Any, b: Any, c: Any, d: Any, s: Any) -> None:
        for i in range(g.size):
            a[i], b[i], c[i], d[i] = rule(gradient(scale, share, g[i], h[i]), a[i], b[i], c[i], d[i], s)

    def five(scale: Any, share: Any, g: Any, h: Any, a: Any, b: Any, c: Any, d: Any, e: Any, s: Any) -> None:
        for i in range(g.size):
            a[i], b[i], c[i], d[i], e[i] = rule(gradient(scale, share, g[i], h[i]), a[i], b[i], c[i], d[i], e[i], s)

    loops: dict[int, Callable[..., None]] = {1: one, 2: two, 3: three, 4: four, 5: five}
    return compiled(loops[vectors], name)
