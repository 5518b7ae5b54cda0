"""Turns at the arithmetic: one long computation at a time on each device.

Several shards of one process would else sweep their vectors at the same time, with more threads than there are cores
for it, and throw each other's out of the cache.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["HOST", "Turns"]

P = ParamSpec("P")
T = TypeVar("T")

HOST = torch.device("cpu")
"""Where bodies are received and measured."""


class Turns:
    """Of one process; safe to use from several threads."""

    def __init__(self) -> None:
        self._locks: defaultdict[torch.device, threading.Lock] = defaultdict(threading.Lock)

    def of(self, device: torch.device, function: Callable[P, T]) -> Callable[P, T]:
        """The function, which then waits for its turn at a device."""
        lock = self._locks[device]

        def in_turn(*arguments: P.args, **options: P.kwargs) -> T:
            with lock:
                return function(*arguments, **options)

        return in_turn
