"""Whether scalars that come from elsewhere are those of a method, and can take a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from freestep.api.validation import LARGEST_INTEGER
from freestep_service.optimizers.method import NOMINAL, Method, Scalars, map_numbers

__all__ = ["NEVER_NEGATIVE", "fault_of"]

_LARGEST = float(np.finfo(np.float32).max)
"""Of coefficients, which are rounded to fp32."""
_LEAST_BETA = 1e-6
"""As of the hyperparameters: x = y + (1 - 1/β)(z - y)."""
_LARGEST_RATE = 1e12
"""Of hyperparameters, and so of step sizes."""
_LARGEST_SUM = 1e300
"""More than all steps of such rates add up to, and so little that no more of them overflow."""
_RANGES: Mapping[str, tuple[float, float]] = {
    "k": (0, LARGEST_INTEGER),
    "weight_sum": (0, _LARGEST_SUM),
    "lr_max": (-1, _LARGEST_RATE),
    "c": (0, 1),
    "staleness": (0, _LARGEST_RATE),
    "mu_product": (0, 1),
    "grad_l1_ema": (0, _LARGEST_SUM),
    "lr": (0, _LARGEST_RATE),
    "num_bad_epochs": (0, LARGEST_INTEGER),
    "cooldown_counter": (0, LARGEST_INTEGER),
}
"""What steps can bring about. Others may do for the next step, and not for a later one, or for a stale gradient."""

NEVER_NEGATIVE = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "step_size"})
"""The state vectors of which roots are taken, or which are sizes."""


def fault_of(method: Method, hyperparameters: Any, scalars: Scalars) -> str | None:
    """What is wrong with a param group's scalars, None if they are sound: their names, or the step that follows."""
    required, known = set(method.initial), _names(method, hyperparameters)
    for name in sorted(required - scalars.keys()):
        return f"{name} is missing"
    for name in sorted(scalars.keys() - known):
        return f"{name} is none of {', '.join(sorted(known))}"
    if not isinstance(scalars["k"], int):
        return "k must be an integer"
    for name, (least, most) in _RANGES.items():
        if not least <= scalars.get(name, least) <= most:
            return f"{name} must be from {least:g} to {most:g}"
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
