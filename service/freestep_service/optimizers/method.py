"""What an optimization method is: data and three functions, over flat fp32 vectors.

The law of this package: no web, no Redis, no clock, no lock. State is data: vectors named as in the papers,
and per param group a few named scalars. A step is `advance`, which turns a group's scalars into the next ones
and this step's coefficients in double precision, and `rule`, the arithmetic that moves an element with them. The
average x is a function of the state, not a mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["PLAIN", "Base", "Buffers", "Conditions", "Direction", "Method", "Scalars", "deaf", "each_number"]

Scalars = Mapping[str, float]
"""A param group's scalar state: `k` (steps taken), and what else the method keeps."""

Buffers = Mapping[str, Tensor]
"""The state vectors by name, each fp32 of one shape; `y` is among them."""

Direction = Callable[..., Tensor]
"""(g, *the base's state) -> what a matrix's step is along, each [rows, columns]; it moves the state, in place."""


class Conditions(NamedTuple):
    """What a step is taken under, beside its gradient: what the log says of it, the same for every shard.

    damping: in (0, 1], multiplies the step's learning rate and leaves the averaging weights alone.
    largest_rate: no more than this is left of the learning rate; it leaves the averaging weights alone too.
    expected_staleness: of gradients in steps, as far as the method is to correct for it (`delay`).
    loss: that of the batch, where it is needed. l1, inner: Σ|g| and Σ g·(z - x) over all parameters, where a method
        needs them.
    """

    damping: float = 1.0
    largest_rate: float = math.inf
    expected_staleness: float = 0.0
    loss: float = 0.0
    l1: float = 0.0
    inner: float = 0.0

    def rate(self, lr: float) -> float:
        """What is left of a learning rate."""
        return min(lr * self.damping, self.largest_rate)


PLAIN = Conditions()
"""Those under which a method does what its paper says."""


def deaf(hyperparameters: Any, scalars: Scalars, name: str, value: float) -> Scalars:
    """The `observe` of methods that no metric concerns."""
    return scalars


@dataclass(frozen=True, eq=False)
class Method:
    """One optimization method.

    buffers: the names of its state vectors, at most five; the points `x`, `y` and `z` start as the parameters, all
        others as zeros.
    initial: a param group's scalars before the first step.
    advance: (hyperparameters, scalars, conditions) -> (next scalars, coefficients). The coefficients are a NamedTuple
        of floats, bools and such tuples.
    rule: (g, *state, coefficients) -> the next state, in the order of `buffers`, as a tuple: one step along the
        gradient `g`. It is arithmetic, the same for numbers and for tensors, and is executed as either (see `sweep`):
        it branches on coefficients that are bools only, calls those functions of torch that `compiled` knows, and
        holds no literals.
    interpolation: (hyperparameters, scalars) -> β, with x = y + (1 - 1/β)(z - y); None where x is kept, or is y.
    direction: hyperparameters -> what makes of each matrix of a group the `g` that the rule gets, before it does; None
        where the rule gets the gradient. It is given what the method keeps beside y and z.
    observe: (hyperparameters, scalars, name, value) -> the next scalars: what a metric that is reported between two
        steps changes.
    needs_sums: whether `advance` needs the conditions' sums; x and z are then among the buffers.
    """

    buffers: tuple[str, ...]
    initial: Scalars
    advance: Callable[[Any, Scalars, Conditions], tuple[Scalars, Any]]
    rule: Callable[..., tuple[Tensor, ...]]
    interpolation: Callable[[Any, Scalars], float] | None = None
    direction: Callable[[Any], Direction | None] | None = None
    observe: Callable[[Any, Scalars, str, float], Scalars] = deaf
    needs_sums: bool = False


@dataclass(frozen=True, eq=False)
class Base:
    """One base optimizer.

    buffers: the names of its state vectors, at most three, which start as zeros.
    advance: (hyperparameters, lr, scalars, conditions) -> (what it changes of the scalars, coefficients): of a step
        with what the conditions leave of the learning rate `lr`.
    rule: (g, z, *state, coefficients) -> (how far the point z moves back, *the next state), as a tuple. As a method's
        rule, else.
    initial: the scalars that it keeps beside `k`, before the first step.
    direction: as a method's, of the base's hyperparameters and state.
    """

    buffers: tuple[str, ...]
    advance: Callable[[Any, float, Scalars, Conditions], tuple[Scalars, Any]]
    rule: Callable[..., tuple[Tensor, ...]]
    initial: Scalars = field(default_factory=dict)
    direction: Callable[[Any], Direction | None] | None = None


def each_number(convert: Callable[[Any], Any], coefficients: Any) -> Any:
    """Coefficients with their numbers converted, in order; bools stay."""
    if isinstance(coefficients, tuple):
        return type(coefficients)(*[each_number(convert, each) for each in coefficients])
    return coefficients if isinstance(coefficients, bool) else convert(coefficients)
