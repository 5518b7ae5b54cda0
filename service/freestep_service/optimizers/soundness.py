"""Whether scalars that come from elsewhere are those of a method, and can take a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from freestep_service.optimizers.method import NOMINAL, Method, Scalars, map_numbers

__all__ = ["NEVER_NEGATIVE", "fault_of"]

_LARGEST = float(np.finfo(np.float32).max)
"""Of coefficients, which are rounded to fp32."""
_LEAST_BETA = 1e-6
"""As of the hyperparameters: x = y + (1 - 1/β)(z - y)."""

NEVER_NEGATIVE = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "step_size"})
"""The state vectors of which roots are taken, or which are sizes."""


def fault_of(method: Method, hyperparameters: Any, scalars: Scalars) -> str | None:
    """What is wrong with a param group's scalars, None if they are sound: their names, or the step that follows."""
    required, known = set(method.initial), _names(method, hyperparameters)
    for name in sorted(required - scalars.keys()):
        return f"{name} is missing"
    for name in sorted(scalars.keys() - known):
        return f"{name} is none of {', '.join(sorted(known))}"
    if not isinstance(scalars["k"], int) or min(scalars["k"], scalars.get("weight_sum", 0)) < 0:
        return "k must be an integer from 0, and weight_sum a number from 0"
    numbers: list[float] = []
    try:
        next_scalars, coefficients = method.advance(hyperparameters, scalars, NOMINAL)
        map_numbers(numbers.append, coefficients)
        beta = 1.0 if method.interpolation is None else method.interpolation(hyperparameters, scalars)
    except (ArithmeticError, TypeError, ValueError) as error:
        return f"no step can be taken with them ({type(error).__name__})"
    is_finite = all(map(math.isfinite, next_scalars.values()))
    if not is_finite or not all(abs(number) <= _LARGEST for number in numbers):
        return "the next step has numbers that cannot be held"
    return None if _LEAST_BETA <= beta <= 1 else f"beta must be from {_LEAST_BETA} to 1"


def _names(method: Method, hyperparameters: Any) -> set[str]:
    """The names of a group's scalars, as far as steps and reported metrics bring them about."""
    after, _ = method.advance(hyperparameters, method.initial, NOMINAL)
    metric = getattr(getattr(hyperparameters, "schedule", None), "metric", "")
    return {*after, *method.observe(hyperparameters, method.initial, metric, 0.0)}
