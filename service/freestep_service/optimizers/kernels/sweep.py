"""Applies a method's rule to a run's flat vectors: one rule, three executions.

On the host, a rule is compiled into a loop that reads and writes each element of each vector once: a step is one pass
over memory. On a GPU it is compiled into a kernel that does the same (`fused`). Where there is no kernel, and in fp64,
the tests' reference, torch evaluates the same function on tensors.
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
from freestep_service.optimizers.kernels.fused import apply_kernel
from freestep_service.optimizers.kernels.gradient import Gradient, Pushed, element_function
from freestep_service.optimizers.kernels.slices import in_slices
from freestep_service.optimizers.kernels.streams import settle
from freestep_service.optimizers.kernels.sums import gradient_sums
from freestep_service.optimizers.method import NOMINAL, Buffers, Conditions, Method, Scalars, map_numbers

__all__ = ["Segment", "gather", "initial_buffers", "segments", "step"]

CHUNK = 16 * 1024 * 1024
"""Elements that torch evaluates a rule on at a time: the rule's intermediate results are tensors of this size."""


@dataclass(frozen=True)
class Segment:
    """Elements `begin` to `end` of the flat vector, of one param group. shapes: those of its tensors, in order."""

    group: str
    begin: int
    end: int
    shapes: tuple[tuple[int, ...], ...] = ()


def segments(slots: Iterable[Slot]) -> tuple[Segment, ...]:
    """The stretches of the flat vector that belong to one param group each, as few as the manifest's order allows."""
    found = []
    for group, members in groupby(slots, key=lambda slot: slot.group):
        run = list(members)
        shapes = tuple(slot.shape for slot in run)
        found.append(Segment(group, run[0].offset, run[-1].offset + run[-1].numel, shapes))
    return tuple(found)


def within(layout: Iterable[Segment], begin: int, end: int) -> Iterator[Segment]:
    """The parts of segments that lie in elements `begin` to `end`, without their shapes."""
    for segment in layout:
        first, last = max(segment.begin, begin), min(segment.end, end)
        if first < last:
            yield Segment(segment.group, first, last)


def initial_buffers(method: Method, parameters: Tensor) -> dict[str, Tensor]:
    """The state vectors before the first step; y is `parameters` itself, flat fp32 [numel]."""
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
    conditions: Conditions = NOMINAL,
) -> dict[str, Scalars]:
    """Moves the buffers, each flat fp32 [numel], in place, one step along a gradient, flat [numel].

    layout: the segments that make up the vectors. hyperparameters, scalars: by param group. Returns the groups' next
    scalars. When it returns, the update is done, on a GPU too.
    """
    if method.needs_sums:
        grad_l1, grad_dot = gradient_sums(gradient, buffers["z"], buffers["x"])
        conditions = conditions._replace(grad_l1=grad_l1, grad_dot=grad_dot)
    advanced = {group: method.advance(hyperparameters[group], state, conditions) for group, state in scalars.items()}
    coefficients = {group: chosen for group, (_, chosen) in advanced.items()}
    state = [buffers[name] for name in method.buffers]
    for segments, direction in _directions(method, layout, hyperparameters, gradient, state):
        _sweep(method.rule, segments, coefficients, direction, state)
    return {group: next_scalars for group, (next_scalars, _) in advanced.items()}


def _directions(
    method: Method,
    layout: Iterable[Segment],
    hyperparameters: Mapping[str, Any],
    gradient: Gradient,
    state: Sequence[Tensor],
) -> Iterator[tuple[Iterable[Segment], Gradient]]:
    """(segments, the gradient for their rule), which for matrices is a direction where the method has one."""
    if method.direction is None:
        yield layout, gradient
        return
    plain, matrices, directions = [], [], torch.empty_like(state[0])
    for segment in layout:
        direction = method.direction(hyperparameters[segment.group])
        if direction is None:
            plain.append(segment)
            continue
        matrices.append(segment)
        begin = segment.begin
        for shape in segment.shapes:
            part = slice(begin, begin := begin + prod(shape))
            if part.start == part.stop:
                # A matrix without elements has no direction.
                continue
            g = gradient.part(part).evaluated(directions.dtype)
            # The vectors after y and z.
            base_state = [vector[part].view(shape) for vector in state[2:]]
            directions[part].view(shape).copy_(direction(g.view(shape), *base_state))
    yield plain, gradient
    yield matrices, Gradient(directions)


class _NoCoefficients(NamedTuple):
    """numba cannot type an empty tuple."""

    unused: float = 0.0


def _replace(g: Tensor, accumulated: Tensor, _: _NoCoefficients) -> tuple[Tensor]:
    return (g,)


def _add(g: Tensor, accumulated: Tensor, _: _NoCoefficients) -> tuple[Tensor]:
    return (accumulated + g,)


def gather(accumulated: Tensor, pushed: Pushed, share: float, *, first: bool) -> None:
    """Adds `share * pushed`, flat [numel], to `accumulated`, fp32 [numel], in place; the first replaces its content."""
    whole = [Segment("", 0, pushed.numel())]
    _sweep(_replace if first else _add, whole, {"": _NoCoefficients()}, Gradient(pushed, share=share), [accumulated])


def _sweep(
    rule: Callable[..., tuple[Tensor, ...]],
    layout: Iterable[Segment],
    coefficients: Mapping[str, Any],
    gradient: Gradient,
    state: Sequence[Tensor],
) -> None:
    """Replaces the state, in place, by `rule(gradient, *state, coefficients of the group)`.

    When it returns, it is done, on a GPU too, so that the gradient's memory may be reused.
    """
    if not is_compiled(state[0]):
        for segment in layout:
            part = slice(segment.begin, segment.end)
            own = rule, coefficients[segment.group], gradient.part(part), [vector[part] for vector in state]
            if not apply_kernel(*own):
                _evaluate(*own)
        settle(state[0].device)
        return
    loop = _loop(rule, len(state), gradient.dtype, gradient.gathered is not None)
    layout = tuple(layout)
    narrow = {group: map_numbers(np.float32, chosen) for group, chosen in coefficients.items()}
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
    """Like `apply_kernel`, by torch, operation by operation."""
    for begin in range(0, gradient.pushed.numel(), CHUNK):
        part = slice(begin, begin + CHUNK)
        old = [vector[part] for vector in state]
        new = rule(gradient.part(part).evaluated(old[0].dtype), *old, coefficients)
        for place, value in zip(old, new, strict=True):
            place.copy_(value)


@cache
def _loop(rule: Callable[..., Any], vectors: int, dtype: torch.dtype, gathered: bool) -> Callable[..., None]:
    """The compiled loop of a rule over a number of state vectors. dtype: that of `Gradient.pieces`.

    It is (scale, share, pushed, gathered, *state, coefficients) -> None, where pushed and gathered are of `pieces`.
    """
    name = f"{rule.__module__}.{rule.__qualname__}.{dtype}.{'group' if gathered else 'one'}"
    rule, gradient = inlined(rule), element_function(dtype, gathered=gathered)

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
