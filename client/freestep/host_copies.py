"""Copies between tensors in host memory.

The law of this file: the calling thread copies, and wakes none of torch's other threads. Those would spin for a while
afterwards, on cores that the service or a backward pass needs; and where no core is free for one of them, all wait
until it has had its turn, which makes a copy of milliseconds one of tenths of a second.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

__all__ = ["copy_on_host"]

_ALONE = 31 * 1024
"""Elements that torch copies on the calling thread: its grain, from which on it divides them, is 32,768."""
_PLAIN = (Tensor, nn.Parameter)
"""What has its elements where its pointer says; subclasses may have them anywhere."""


def copy_on_host(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source to its target, of the same shape and any dtype, as `Tensor.copy_` does under `no_grad`."""
    small: tuple[list[Tensor], list[Tensor]] = [], []
    for target, source in zip(targets, sources, strict=True):
        if target.numel() <= _ALONE:
            small[0].append(target)
            small[1].append(source)
        elif _is_plain(target) and _is_plain(source) and target.dtype == source.dtype:
            # It releases the interpreter while it copies.
            ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)
            increment_version(target)
        else:
            _copy_in_pieces(target, source)
    if small[0]:
        torch._foreach_copy_(*small)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _copy_in_pieces(target: Tensor, source: Tensor) -> None:
    if target.is_contiguous() and source.is_contiguous():
        target, source = target.view(-1), source.view(-1)
    rows = max(1, _ALONE * len(target) // target.numel())
    for ours, theirs in zip(torch.split(target, rows), torch.split(source, rows), strict=True):
        if ours.numel() <= _ALONE:
            ours.copy_(theirs)
        else:
            _copy_in_pieces(ours[0], theirs[0])
