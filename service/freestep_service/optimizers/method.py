"""What an optimization method is: data and three functions, over flat fp32 vectors.

The law of this package: no web, no Redis, no clock, no lock. State is data: vectors named as in the papers,
and per param group a few named scalars. A step is `advance`, which turns a group's scalars into the next ones
and this step's coefficients in double precision, and `update`, which sweeps the vectors with them. The average
x is a function of the state, not a mode.
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

    buffers: the names of its state vectors; `y` and `z` start as the parameters, all others as zeros.
    initial: a param group's scalars before the first step.
    advance: (hyperparameters, scalars, damping) -> (next scalars, coefficients). `damping` in (0, 1] multiplies
        the step's learning rate and leaves the averaging weights alone.
    update: (g, buffers, coefficients) moves the buffers, in place, by one step along the gradient `g`, which it
        may overwrite. It is elementwise, so it may be given any slice of the vectors.
    interpolation: hyperparameters -> β, with x = y + (1 - 1/β)(z - y); None where x is y.
    """

    buffers: tuple[str, ...]
    initial: Scalars
    advance: Callable[[Any, Scalars, float], tuple[Scalars, Any]]
    update: Callable[[Tensor, Buffers, Any], None]
    interpolation: Callable[[Any], float] | None = None
