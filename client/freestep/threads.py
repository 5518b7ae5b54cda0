"""Functions on threads: several at the same time, or one in the background.

The law of this file: a process that ends does not wait for answers, so all threads are daemons. But it waits for what
computes: a thread that comes back from torch to an interpreter which is gone aborts the process.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["Threads", "run_in_background"]

T = TypeVar("T")

_LAST_S = 2.0
"""Seconds for which a process that ends waits for functions: one that takes longer waits for an answer."""

_running: set[Future[Any]] = set()


class Threads:
    """Threads that run several functions at the same time, and are reused; a forked child begins with none.

    Their number has no limit: requests that wait for each other must all be sent.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._idle = _Idle()
        # Those of a client that nobody closes end with it.
        self._end = weakref.finalize(self, self._idle.end)
        self._end.atexit = False

    def run_all(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Runs functions at the same time, each on a thread of its own; returns when the last one has ended."""
        if self._process != os.getpid():
            # A forked child has none of the parent's threads.
            self._begin()
        futures = [self._idle.start(function) for function in functions]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the threads, as soon as their functions have ended."""
        self._end()


class _Idle:
    """The threads that have nothing to do, each by the queue of its tasks. No lock, which a fork would find taken."""

    def __init__(self) -> None:
        self._queues: deque[SimpleQueue[Callable[[], None] | None]] = deque()
        self._has_ended = False

    def start(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on a thread that is idle, or on a new one."""
        try:
            queue = self._queues.pop()
        except IndexError:
            queue = SimpleQueue()
            threading.Thread(target=_work, args=(queue,), name="freestep-shard", daemon=True).start()
        future = _begun()
        # Whoever waits for the outcome finds the thread idle.
        queue.put(lambda: _run(function, future, lambda: self._add(queue)))
        return future

    def _add(self, queue: SimpleQueue[Callable[[], None] | None]) -> None:
        self._queues.append(queue)
        if self._has_ended:
            self.end()

    def end(self) -> None:
        """Ends these threads, and the others when they become idle."""
        self._has_ended = True
        with suppress(IndexError):
            while True:
                self._queues.pop().put(None)


def _work(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := queue.get()) is not None:
        task()
        # An idle thread keeps nothing of a call.
        del task


def _run(function: Callable[[], T], future: Future[T], done: Callable[[], Any] = lambda: None) -> None:
    """Runs a function for a future; calls `done` just before this has the outcome."""
    try:
        result = function()
    except BaseException as error:
        done()
        future.set_exception(error)
    else:
        done()
        future.set_result(result)


def run_in_background(name: str, function: Callable[[], T]) -> Future[T]:
    """Runs a function on a daemon thread of this name, which does not keep the process alive."""
    future = _begun()
    threading.Thread(target=_run, args=(function, future), name=name, daemon=True).start()
    return future


def _begun() -> Future[Any]:
    future: Future[Any] = Future()
    _running.add(future)
    future.add_done_callback(_running.discard)
    return future


def _await_running() -> None:
    wait(list(_running), _LAST_S)


atexit.register(_await_running)
# A forked child has none of the threads.
os.register_at_fork(after_in_child=_running.clear)
