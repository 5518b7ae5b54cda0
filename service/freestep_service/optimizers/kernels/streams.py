"""The streams of a GPU: bodies are copied there on one of their own, beside the updates and points on the default one.

No thread waits for a whole device, only for the work that it has itself put on a stream, and never on the event loop.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

__all__ = ["arriving", "settle"]


def settle(device: torch.device) -> None:
    """Waits until the calling thread's stream has finished its work; on the host, returns at once."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def arriving(device: torch.device) -> AbstractContextManager[Any]:
    """A block whose work on a GPU runs on the stream for bodies; on the host, it has no effect."""
    return torch.cuda.stream(_arrivals(device)) if device.type == "cuda" else nullcontext()


@cache
def _arrivals(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
