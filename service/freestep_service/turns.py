"""Turns at the arithmetic: one long computation at a time on each device, and the threads that take them.

Several shards of one process would else sweep their vectors at the same time, with more threads than there are cores
for it, and throw each other's out of the cache.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import torch

__all__ = ["HOST", "Turns", "arithmetic_threads"]

P = ParamSpec("P")
T = TypeVar("T")

HOST = torch.device("cpu")
"""Where bodies are received and measured."""


class Turns:
    """Of one process; safe to use from several threads.

    few: elements for which arithmetic is done sooner than a thread could be asked to do it.
    """

    def __init__(self, few: int = 0) -> None:
        self._few = few
        self._locks: defaultdict[torch.device, threading.Lock] = defaultdict(threading.Lock)
        self.compiler = arithmetic_threads("compiler", 1)
        """Where kernels are compiled: the next in line may find its own made."""

    def needs_none(self, device: torch.device, numel: int) -> bool:
        """Whether arithmetic is so little that whoever wants it does it at once: on the event loop, out of turn."""
        return device == HOST and numel <= self._few

    def of(self, device: torch.device, function: Callable[P, T]) -> Callable[P, T]:
        """The function, which then waits for its turn at a device."""
        lock = self._locks[device]

        def in_turn(*arguments: P.args, **options: P.kwargs) -> T:
            with lock:
                return function(*arguments, **options)

        return in_turn


def arithmetic_threads(name: str, most: int | None = None) -> ThreadPoolExecutor:
    """At most `most` threads, whose tensor arithmetic is spread over as many as that of the calling thread.

    OpenMP keeps that number for every thread by itself, and starts with that of the cores: a thread that is not told
    has helpers that spin, against the event loop and each other, even for the square root of a few elements.
    """
    return ThreadPoolExecutor(most, f"freestep-{name}", partial(torch.set_num_threads, torch.get_num_threads()))
