"""What an optimization method is: names, scalars and pure functions. No web, no Redis, no clock, no lock.

A step is `advance`, which computes a param group's next scalars and the step's coefficients in double precision, and
`rule`, the arithmetic that moves an element with these coefficients. State vectors are named as in the papers. The
average x is a function of the state, so there is no train or eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "NOMINAL",
    "Base",
    "Buffers",
    "Conditions",
    "Direction",
    "Method",
    "Scalars",
    "ignore_metrics",
    "keep_scalars",
    "map_numbers",
]

Scalars = Mapping[str, float]
"""A param group's scalar state: `k`, the number of steps taken, and what else the method keeps.

After the first step that is also `scheduled_lr`, the learning rate of the newest step, after all that changes it:
warmup, schedule, plateau, damping, bound, and the correction for stale gradients. It is what the `schedulefree` package
logs as `group["scheduled_lr"]`:

- SGD, AdamW and the base of a wrapper or of generalized primal averaging: γ, without factors of the base's own;
- RAdam: γ times the rectification, 0 in the silent steps;
- ScheduleFree+: γ times the Polyak step size, the η of `adamc`;
- the baselines: the γ that their schedule gives; DiLoCo: γ of the outer step.
"""

Buffers = Mapping[str, Tensor]
"""The state vectors by name, all flat fp32 [numel] on one device; `y` is among them."""

Direction = Callable[..., Tensor]
"""(gradient, *the base's state) -> the direction of a step, all [rows, columns] of one matrix; changes the state."""


class Conditions(NamedTuple):
    """What a step depends on beside its gradient. It is derived from the commit log, so it is the same on all shards.

    damping: factor on the step's learning rate, in (0, 1]. max_lr: upper bound on the learning rate, after damping.
    Neither affects the averaging weights.
    expected_staleness: the staleness τ̂ of gradients, in steps, that the method corrects for; 0: no correction.
    loss: mean loss of the step's pushes, for methods that need it.
    grad_l1, grad_dot: Σ|g| and Σ g·(z - x) over all parameters, for methods that need them.
    """

    damping: float = 1.0
    max_lr: float = math.inf
    expected_staleness: float = 0.0
    loss: float = 0.0
    grad_l1: float = 0.0
    grad_dot: float = 0.0

    def limited(self, lr: float) -> float:
        """A learning rate, damped and bounded."""
        return min(lr * self.damping, self.max_lr)


NOMINAL = Conditions()
"""Without damping, bound or correction: the method is that of its paper."""


def ignore_metrics(hyperparameters: Any, scalars: Scalars, name: str, value: float) -> Scalars:
    """The `observe` of methods that do not depend on metrics."""
    return scalars


def keep_scalars(before: Any, after: Any, scalars: Scalars) -> Scalars:
    """The `retune` of methods whose scalars hold nothing of their hyperparameters."""
    return scalars


@dataclass(frozen=True, eq=False)
class Method:
    """An optimization method.

    buffers: names of the state vectors, at most five. x, y and z are initialized with the parameters, others with 0.
    initial: a param group's scalars before the first step.
    advance: (hyperparameters, scalars, conditions) -> (next scalars, coefficients). `scheduled_lr` is among the
        scalars. The coefficients are a NamedTuple of floats, bools and such tuples.
    rule: (g, *state, coefficients) -> the next state, as a tuple in the order of `buffers`: one step along the gradient
        `g`. The same function is compiled for numbers and evaluated on tensors (`kernels.sweep`): it branches only on
        coefficients that are bools, calls only those functions of torch that `kernels.compiled` overloads, and contains
        no literals, which would make doubles of fp32.
    interpolation: (hyperparameters, scalars) -> β, where x = y + (1 - 1/β)(z - y); None where x is a state vector, or
        equals y.
    direction: hyperparameters -> the function that replaces a matrix's gradient before `rule` gets it, or None for
        param groups without one. It is given the state vectors after y and z.
    observe: (hyperparameters, scalars, metric, value) -> next scalars, for a metric that is reported between two steps.
    retune: (hyperparameters before, hyperparameters after, scalars) -> next scalars, for a change between two steps.
    needs_sums: whether `advance` needs `grad_l1` and `grad_dot`; then x and z are among the buffers.
    """

    buffers: tuple[str, ...]
    initial: Scalars
    advance: Callable[[Any, Scalars, Conditions], tuple[Scalars, Any]]
    rule: Callable[..., tuple[Tensor, ...]]
    interpolation: Callable[[Any, Scalars], float] | None = None
    direction: Callable[[Any], Direction | None] | None = None
    observe: Callable[[Any, Scalars, str, float], Scalars] = ignore_metrics
    retune: Callable[[Any, Any, Scalars], Scalars] = keep_scalars
    needs_sums: bool = False


@dataclass(frozen=True, eq=False)
class Base:
    """A base optimizer, for methods that average over one.

    buffers: names of its state vectors, at most three, initialized with 0.
    advance: (hyperparameters, lr, scalars, conditions) -> (changed scalars, coefficients), where `lr` is neither damped
        nor bounded yet.
    rule: (g, z, *state, coefficients) -> (the decrease of z, *the next state), as a tuple; otherwise like a method's.
    initial: the scalars that it keeps beside `k`, before the first step.
    direction: like a method's, of the base's hyperparameters.
    """

    buffers: tuple[str, ...]
    advance: Callable[[Any, float, Scalars, Conditions], tuple[Scalars, Any]]
    rule: Callable[..., tuple[Tensor, ...]]
    initial: Scalars = field(default_factory=dict)
    direction: Callable[[Any], Direction | None] | None = None


def map_numbers(convert: Callable[[Any], Any], coefficients: Any) -> Any:
    """Coefficients with each number converted, in order; bools stay."""
    if isinstance(coefficients, tuple):
        return type(coefficients)(*[map_numbers(convert, each) for each in coefficients])
    return coefficients if isinstance(coefficients, bool) else convert(coefficients)
