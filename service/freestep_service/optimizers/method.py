"""What an optimization method is: data and three functions, over flat fp32 vectors.

The law of this package: no web, no Redis, no clock, no lock. State is data: vectors named as in the papers,
and per param group a few named scalars. A step is `advance`, which turns a group's scalars into the next ones
and this step's coefficients in double precision, and `rule`, the arithmetic that moves an element with them. The
average x is a function of the state, not a mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Buffers", "Method", "Scalars"]

Scalars = Mapping[str, float]
"""A param group's scalar state: `k` (steps taken), and what else the method keeps."""

Buffers = Mapping[str, Tensor]
"""The state vectors by name, each fp32 of one shape; `y` is among them."""


@dataclass(frozen=True)
class Method:
    """One optimization method.

    buffers: the names of its state vectors, at most three; `y` and `z` start as the parameters, all others as zeros.
    initial: a param group's scalars before the first step.
    advance: (hyperparameters, scalars, damping) -> (next scalars, coefficients). `damping` in (0, 1] multiplies
        the step's learning rate and leaves the averaging weights alone. The coefficients are a NamedTuple of floats
        and bools.
    rule: (g, *state, coefficients) -> the next state, in the order of `buffers`, as a tuple: one step along the
        gradient `g`. It is arithmetic, the same for numbers and for tensors, and is executed as either (see `sweep`):
        it branches on coefficients that are bools only, takes roots by `torch.sqrt`, and holds no literals.
    interpolation: hyperparameters -> β, with x = y + (1 - 1/β)(z - y); None where x is y.
    """

    buffers: tuple[str, ...]
    initial: Scalars
    advance: Callable[[Any, Scalars, float], tuple[Scalars, Any]]
    rule: Callable[..., tuple[Tensor, ...]]
    interpolation: Callable[[Any], float] | None = None
