"""The streams of a GPU: bodies arrive on one of their own, beside the updates and points, which follow each other.

Nobody waits for a whole device: a thread waits, off the event loop, for what it has itself asked of a stream.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

__all__ = ["arriving", "settle"]


def settle(device: torch.device) -> None:
    """Returns when the calling thread's stream has done all that it was asked; on the host that is at once."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def arriving(device: torch.device) -> AbstractContextManager[Any]:
    """A block whose work on a GPU is done beside that of its other streams; on the host it is as any other."""
    return torch.cuda.stream(_arrivals(device)) if device.type == "cuda" else nullcontext()


@cache
def _arrivals(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
