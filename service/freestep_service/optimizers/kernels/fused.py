"""Kernels for a GPU, made of rules by torch.compile: a step is one pass over memory there too.

A kernel computes in fp32 on coefficients rounded to fp32, as the loops on the host do, but with contraction and the
GPU's division, so its results equal the loops' within rounding. One kernel gives an element the same result wherever it
stands. Where no kernel can be compiled, for want of Triton or of a C compiler, torch evaluates the rule operation by
operation, with a pass over memory for each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freestep_service.optimizers.kernels.gradient import Gradient
from freestep_service.optimizers.kernels.streams import settle
from freestep_service.optimizers.method import map_numbers

__all__ = ["apply_kernel"]

logger = logging.getLogger("freestep")

BACKEND = "inductor"
"""The backend of torch.compile."""
MAX_LAUNCH = 2**30
"""Elements of a launch at most: more need 64-bit indices, and so another kernel."""
_TRIAL = 1024 * 1024
"""Elements that a new kernel is tried on: torch chooses a kernel's blocks by this number."""
_ALIGNMENT = 16
"""Bytes. torch copies vectors that are not aligned to it, there and back, for kernels compiled for ones that are: so a
kernel is compiled for either."""


class _Form(NamedTuple):
    """What distinguishes one kernel from another.

    state: number of state vectors. flags: the coefficients, of which rules branch on the bools, with None for the
    numbers, which change from step to step. gathers: whether the gradient has a gathered part.
    """

    rule: Callable[..., tuple[Tensor, ...]]
    state: int
    flags: Any
    gathers: bool
    device: torch.device
    is_aligned: bool


def apply_kernel(
    rule: Callable[..., tuple[Tensor, ...]], coefficients: Any, gradient: Gradient, state: Sequence[Tensor]
) -> bool:
    """Replaces the state, flat fp32 [numel] each, in place by `rule(gradient, *state, coefficients)`, in one kernel.

    Returns False, and does nothing, where there is none: it could not be compiled, a dtype is not fp32, or there is one
    element only, for which torch.compile would make another kernel. The first call with a form takes seconds.
    """
    pushed, scale, share, gathered = gradient
    given = [pushed, *(() if gathered is None else (gathered,)), *state]
    if pushed.numel() < 2 or any(vector.dtype != torch.float32 for vector in given):
        return False
    # Kernels would depend on the tensors that these are views of.
    vectors = [vector.data for vector in given]
    is_aligned = all(vector.data_ptr() % _ALIGNMENT == 0 for vector in vectors)
    flags = map_numbers(lambda _: None, coefficients)
    kernel = _kernel(_Form(rule, len(state), flags, gathered is not None, state[0].device, is_aligned))
    if kernel is None:
        return False
    # A vector on the device, since numbers would be compiled into the kernel.
    numbers = torch.tensor([scale, share, *_numbers(coefficients)], dtype=torch.float32, device="cpu")
    numbers = numbers.to(state[0].device, non_blocking=True)
    for begin in range(0, pushed.numel(), MAX_LAUNCH):
        kernel(numbers, *(vector[begin : begin + MAX_LAUNCH].data for vector in vectors))
    return True


def _numbers(coefficients: Any) -> list[Any]:
    found: list[Any] = []
    map_numbers(found.append, coefficients)
    return found


@cache
def _kernel(form: _Form) -> Callable[..., None] | None:
    """The form's kernel, which has been tried; None, which is logged, where it does not work."""
    # Imported here: it takes long, and the host does not need it.
    from torch._inductor import config

    begin = 0 if form.is_aligned else 1
    count = 1 + form.gathers + form.state
    try:
        kernel = _compiled(form)
        numbers = torch.ones(2 + len(_numbers(form.flags)), dtype=torch.float32, device=form.device)
        ones = torch.ones(begin + _TRIAL, dtype=torch.float32, device=form.device)
        vectors = [ones.clone()[begin:].data for _ in range(count)]
        # In this process: a pool of compiler processes would stay for the sake of one kernel.
        with config.patch(compile_threads=1):
            kernel(numbers, *vectors)
        settle(form.device)
    except Exception as error:
        name = f"{form.rule.__module__}.{form.rule.__qualname__}"
        reason = " ".join(str(error).splitlines()[:2])
        logger.warning(
            "%s is not compiled for %s but evaluated operation by operation: %s: %s",
            name, form.device, type(error).__name__, reason,
        )  # fmt: skip
        return None
    return kernel


def _compiled(form: _Form) -> Callable[..., None]:
    rule, flags, gathers = form.rule, form.flags, form.gathers

    def sweep(numbers: Tensor, pushed: Tensor, *vectors: Tensor) -> None:
        scale, share, *others = numbers.unbind()
        rest = iter(others)
        coefficients = map_numbers(lambda _: next(rest), flags)
        gathered, state = (vectors[0], vectors[1:]) if gathers else (None, vectors)
        gradient = Gradient(pushed, scale, share, gathered).evaluated(torch.float32)
        for old, new in zip(state, rule(gradient, *state, coefficients), strict=True):
            # A vector that the rule returns as it is would make a kernel that copies it onto itself.
            if new is not old:
                old.copy_(new)

    # torch.compile keeps and counts compilations by the code of a function, so each form gets its own.
    code = sweep.__code__.replace(co_name=f"sweep_{rule.__name__.strip('_')}")
    own = FunctionType(code, sweep.__globals__, code.co_name, closure=sweep.__closure__)
    return torch.compile(own, backend=BACKEND, fullgraph=True, dynamic=True)
