"""Device locks: one long computation at a time on each device, and the threads that run them.

Without them, several shards of one process would sweep their vectors at the same time, with more threads than cores,
and evict each other from the cache.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import torch

__all__ = ["HOST", "SLOWER", "DeviceLocks", "arithmetic_threads", "uninterrupted"]

P = ParamSpec("P")
T = TypeVar("T")

HOST = torch.device("cpu")
"""Where bodies are received and decoded."""


SLOWER = 8
"""What an element counts, beside `inline_elements`, of work that is more than a pass over the elements."""


class DeviceLocks:
    """One lock per device, for one process; safe to use from several threads.

    inline_elements: work on no more elements is done inline: handing it to a thread costs more.
    """

    def __init__(self, inline_elements: int = 0) -> None:
        self._inline_elements = inline_elements
        self._locks: defaultdict[torch.device, threading.Lock] = defaultdict(threading.Lock)
        self._decoders = arithmetic_threads("decoder")
        """Of their own, so that nothing else that threads are used for, a hung disk say, holds up the bodies."""
        self.compiler = arithmetic_threads("compiler", 1)
        """The thread that compiles kernels; one at a time: the next request may find its kernel made."""

    def runs_inline(self, device: torch.device, elements: int) -> bool:
        """True if the work is small enough to run inline on the event loop, without the device lock."""
        return device == HOST and elements <= self._inline_elements

    def decoding(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> asyncio.Future[T]:
        """Runs a function in one of the threads that decode bodies."""
        return asyncio.get_running_loop().run_in_executor(self._decoders, partial(function, *arguments, **options))

    def close(self) -> None:
        """Ends the threads once they are done."""
        self._decoders.shutdown(wait=False)
        self.compiler.shutdown(wait=False)

    def exclusive(self, device: torch.device, function: Callable[P, T]) -> Callable[P, T]:
        """The function, holding the device's lock while it runs."""
        lock = self._locks[device]

        def locked(*arguments: P.args, **options: P.kwargs) -> T:
            with lock:
                return function(*arguments, **options)

        return locked


def arithmetic_threads(name: str, most: int | None = None) -> ThreadPoolExecutor:
    """At most `most` threads, whose tensor arithmetic is spread over as many as that of the calling thread.

    OpenMP keeps that number for every thread by itself, and starts with that of the cores: a thread that is not told
    has helpers that spin, against the event loop and each other, even for the square root of a few elements.
    """
    return ThreadPoolExecutor(most, f"freestep-{name}", partial(torch.set_num_threads, torch.get_num_threads()))


async def uninterrupted(work: asyncio.Future[T]) -> T:
    """Waits for work in a thread, which a cancellation cannot stop; a cancellation is raised when the work has ended.

    So the memory that the thread uses is not given back before.
    """
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        work.exception()
        raise cancelled
    return work.result()
