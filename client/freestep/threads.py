"""Functions on threads: several at the same time, or one in the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from freestep.forks import ForkLock

__all__ = ["Threads", "run_in_background"]

T = TypeVar("T")

_MOST_THREADS = 1 << 16
"""Effectively no limit: requests that wait for each other must all be sent; idle threads are reused."""


class Threads:
    """Threads that run several functions at the same time; a forked child begins with none."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._lock = ForkLock()
        self._process = os.getpid()

    def run_all(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Runs functions at the same time, each on a thread of its own; returns when the last one has ended."""
        if self._process != os.getpid():
            # A forked child has none of the parent's threads.
            self._pool, self._process = None, os.getpid()
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="freestep-shard")
            futures = [self._pool.submit(function) for function in functions]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the threads, as soon as their functions have ended."""
        if self._pool is not None and self._process == os.getpid():
            # After an interrupt, requests may still be waiting for their answers; these are not needed.
            self._pool.shutdown(wait=False)


def run_in_background(name: str, function: Callable[[], T]) -> Future[T]:
    """Runs a function on a daemon thread of this name, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
