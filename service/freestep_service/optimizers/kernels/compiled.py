"""Compilation of loops for the CPU with numba: to machine code that releases the GIL and is kept on disk.

Loops are compiled to IEEE arithmetic without contraction, in which vector instructions give what scalar ones give. So
an element's result does not depend on its position in a vector, nor on the boundaries of shards. Loops get fp32 numbers
only, and rules contain no literals: a single double would make doubles of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import config, njit, types
from numba.extending import overload, register_jitable
from torch import Tensor

from freestep_service.optimizers.kernels.machine_code import cache_directory

__all__ = ["compiled", "inlined", "is_compiled"]

F = TypeVar("F", bound=Callable[..., Any])


_CACHE = cache_directory()
if _CACHE is not None:
    vars(config)["CACHE_DIR"] = str(_CACHE)


def compiled(loop: F, name: str = "", *, reassociate: bool = False) -> F:
    """The loop as machine code, compiled for each combination of argument types when it is first called with it.

    name: distinguishes loops that are made from the same lines with different functions. numba keeps a file for each
        name: without it, services that start at the same time could load one loop's code for another.
    reassociate: sums may be taken in any order, as vector instructions do; NaN and infinity are preserved.
    """
    if name:
        loop.__qualname__ += f".{name}"
    fastmath = {"reassoc"} if reassociate else False
    return cast(F, njit(nogil=True, error_model="numpy", fastmath=fastmath, cache=_CACHE is not None)(loop))


def inlined(function: F) -> F:
    """The function itself, which compiled loops may call from now on."""
    return register_jitable(function)


def is_compiled(vector: Tensor) -> bool:
    """Whether compiled loops process a vector: it is fp32 and on the host. Others are left to torch."""
    return vector.device.type == "cpu" and vector.dtype == torch.float32


_ZERO, _ONE = np.float32(0), np.float32(1)


def _sqrt(x: Any) -> Callable[[Any], Any] | None:
    return (lambda x: math.sqrt(x)) if isinstance(x, types.Float) else None


def _abs(x: Any) -> Callable[[Any], Any] | None:
    return (lambda x: abs(x)) if isinstance(x, types.Float) else None


def _sign(x: Any) -> Callable[[Any], Any] | None:
    # The order of comparisons here and below returns NaN for NaN, as torch does.
    return (lambda x: _ONE if x > _ZERO else -_ONE if x < _ZERO else x) if isinstance(x, types.Float) else None


def _relu(x: Any) -> Callable[[Any], Any] | None:
    return (lambda x: _ZERO if x < _ZERO else x) if isinstance(x, types.Float) else None


def _maximum(x: Any, y: Any) -> Callable[[Any, Any], Any] | None:
    return (lambda x, y: x if x > y or x != x else y) if isinstance(x, types.Float) else None


def _clamp(x: Any, low: Any, high: Any) -> Callable[[Any, Any, Any], Any] | None:
    return (lambda x, low, high: low if x < low else high if x > high else x) if isinstance(x, types.Float) else None


def _where(condition: Any, x: Any, y: Any) -> Callable[[Any, Any, Any], Any] | None:
    return (lambda condition, x, y: x if condition else y) if isinstance(x, types.Float) else None


# Rules call these functions of torch, on numbers as on tensors.
for _function, _of_numbers in (
    (torch.sqrt, _sqrt),
    (torch.abs, _abs),
    (torch.sign, _sign),
    (torch.relu, _relu),
    (torch.maximum, _maximum),
    (torch.clamp, _clamp),
    (torch.where, _where),
):
    overload(_function, strict=False)(_of_numbers)
