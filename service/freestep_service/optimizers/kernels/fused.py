"""The seam to torch.compile, which makes one kernel of a rule for a GPU: there too a step is one pass over memory.

The kernel computes in fp32, on coefficients rounded to fp32, as the loops on the host do; but it is compiled with
contraction, and with the GPU's own division, so what comes out is the loops' result within rounding, not to the bit.
One kernel gives an element the same result wherever it stands. Where none can be compiled, as without Triton or a C
compiler, torch evaluates the rule operation by operation, with a pass over memory for each.
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
from freestep_service.optimizers.method import each_number

__all__ = ["fuse"]

logger = logging.getLogger("freestep")

BACKEND = "inductor"
"""Of torch.compile."""
MOST = 2**30
"""Elements of a launch: more of them would need indices of 64 bits, and so another kernel."""
_TRIED = 1024 * 1024
"""Elements that a new kernel is tried on. Its blocks are chosen by their number, so they may not be few."""
_ALIGNMENT = 16
"""Bytes: a kernel is compiled for vectors that begin at multiples of it, or else for those that may not; the former
would have the others copied, there and back."""


class _Form(NamedTuple):
    """What a kernel is compiled for.

    state: the number of state vectors. flags: the coefficients, of which rules branch on bools, with None for numbers,
    which change from step to step. gathers: whether the gradient has a part that was gathered before.
    """

    rule: Callable[..., tuple[Tensor, ...]]
    state: int
    flags: Any
    gathers: bool
    device: torch.device
    is_aligned: bool


def fuse(
    rule: Callable[..., tuple[Tensor, ...]], coefficients: Any, gradient: Gradient, state: Sequence[Tensor]
) -> bool:
    """Replaces the state, in place, by `rule(gradient, *state, coefficients)` in one kernel.

    False, and nothing is done, where there is none: where it could not be compiled, for other dtypes than fp32, and for
    one element, of which torch.compile would make another kernel. The first call with a form takes seconds.
    """
    pushed, scale, share, gathered = gradient
    given = [pushed, *(() if gathered is None else (gathered,)), *state]
    if pushed.numel() < 2 or any(vector.dtype != torch.float32 for vector in given):
        return False
    # Without what they are views of, on which kernels would depend.
    vectors = [vector.data for vector in given]
    is_aligned = all(vector.data_ptr() % _ALIGNMENT == 0 for vector in vectors)
    flags = each_number(lambda _: None, coefficients)
    kernel = _kernel(_Form(rule, len(state), flags, gathered is not None, state[0].device, is_aligned))
    if kernel is None:
        return False
    # A vector on the device, not numbers: those would be compiled into the kernel.
    numbers = torch.tensor([scale, share, *_numbers(coefficients)])
    numbers = numbers.to(state[0].device, torch.float32, non_blocking=True)
    for begin in range(0, pushed.numel(), MOST):
        kernel(numbers, *(vector[begin : begin + MOST].data for vector in vectors))
    return True


def _numbers(coefficients: Any) -> list[Any]:
    found: list[Any] = []
    each_number(found.append, coefficients)
    return found


@cache
def _kernel(form: _Form) -> Callable[..., None] | None:
    """The form's kernel, which has been tried; None, which is logged, where it did not work."""
    # Here, since it takes long to import, and the host has no need of it.
    from torch._inductor import config

    begin = 0 if form.is_aligned else 1
    count = 1 + form.gathers + form.state
    try:
        kernel = _compiled(form)
        numbers = torch.ones(2 + len(_numbers(form.flags)), device=form.device)
        vectors = [torch.ones(begin + _TRIED, device=form.device)[begin:].data for _ in range(count)]
        # In this process: a pool of others would stay for the sake of one kernel.
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
        coefficients = each_number(lambda _: next(rest), flags)
        gathered, state = (vectors[0], vectors[1:]) if gathers else (None, vectors)
        gradient = Gradient(pushed, scale, share, gathered).evaluated(torch.float32)
        for place, moved in zip(state, rule(gradient, *state, coefficients), strict=True):
            # What a rule leaves alone would else be a kernel that copies it onto itself.
            if moved is not place:
                place.copy_(moved)

    # torch.compile keeps what it has compiled, and counts it, by the code of a function: each form has its own.
    code = sweep.__code__.replace(co_name=f"sweep_{rule.__name__.strip('_')}")
    own = FunctionType(code, sweep.__globals__, code.co_name, closure=sweep.__closure__)
    return torch.compile(own, backend=BACKEND, fullgraph=True, dynamic=True)
