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

from freestep_service.optimizers.streams import settle

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

    state: the number of state vectors. kind: the coefficients' type. flags: their values where they are bools, on which
    rules branch, and None where they are numbers, which change from step to step.
    """

    rule: Callable[..., tuple[Tensor, ...]]
    state: int
    kind: type[Any]
    flags: tuple[bool | None, ...]
    device: torch.device
    is_aligned: bool


def fuse(
    rule: Callable[..., tuple[Tensor, ...]], coefficients: Any, scale: float, gradient: Tensor, state: Sequence[Tensor]
) -> bool:
    """Replaces the state, in place, by `rule(scale * gradient, *state, coefficients)` in one kernel.

    False, and nothing is done, where there is none: where it could not be compiled, for other dtypes than fp32, and for
    one element, of which torch.compile would make another kernel. The first call with a form takes seconds.
    """
    if gradient.dtype != torch.float32 or gradient.numel() < 2:
        return False
    # Without what they are views of, on which kernels would depend.
    vectors = [vector.data for vector in (gradient, *state)]
    kernel = _kernel(
        _Form(
            rule,
            len(state),
            type(coefficients),
            tuple(value if isinstance(value, bool) else None for value in coefficients),
            gradient.device,
            all(vector.data_ptr() % _ALIGNMENT == 0 for vector in vectors),
        )
    )
    if kernel is None:
        return False
    # A vector on the device, not numbers: those would be compiled into the kernel.
    numbers = torch.tensor([scale, *(value for value in coefficients if not isinstance(value, bool))])
    numbers = numbers.to(gradient.device, torch.float32, non_blocking=True)
    for begin in range(0, gradient.numel(), MOST):
        kernel(numbers, *(vector[begin : begin + MOST].data for vector in vectors))
    return True


@cache
def _kernel(form: _Form) -> Callable[..., None] | None:
    """The form's kernel, which has been tried; None, which is logged, where it did not work."""
    # Here, since it takes long to import, and the host has no need of it.
    from torch._inductor import config

    begin = 0 if form.is_aligned else 1
    try:
        kernel = _compiled(form)
        numbers = torch.ones(1 + form.flags.count(None), device=form.device)
        vectors = [torch.ones(begin + _TRIED, device=form.device)[begin:].data for _ in range(1 + form.state)]
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
    rule, kind, flags = form.rule, form.kind, form.flags

    def sweep(numbers: Tensor, gradient: Tensor, *state: Tensor) -> None:
        scale, *others = numbers.unbind()
        rest = iter(others)
        coefficients = kind(*[next(rest) if flag is None else flag for flag in flags])
        for place, moved in zip(state, rule(scale * gradient, *state, coefficients), strict=True):
            # What a rule leaves alone would else be a kernel that copies it onto itself.
            if moved is not place:
                place.copy_(moved)

    # torch.compile keeps what it has compiled, and counts it, by the code of a function: each form has its own.
    code = sweep.__code__.replace(co_name=f"sweep_{rule.__name__.strip('_')}")
    own = FunctionType(code, sweep.__globals__, code.co_name, closure=sweep.__closure__)
    return torch.compile(own, backend=BACKEND, fullgraph=True, dynamic=True)
