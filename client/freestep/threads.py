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
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["LOOK_S", "Threads", "result_of", "run_in_background", "stop_by"]

T = TypeVar("T")

_LAST_S = 2.0
"""Seconds for which a process that ends waits for functions: one that takes longer waits for an answer."""

LOOK_S = 0.5
"""Seconds within which a signal is noticed that did not end a wait, as one that came just before it."""

_BREAK_S = 2.0
"""Seconds for which the end of functions is waited for that were broken off: one that takes longer waits for what it
has to ask before it goes on."""

_busy: set[Future[None]] = set()
"""Of each thread that has something to do: it is done when the thread has freed what that was given, too."""


class Threads:
    """Threads that run several functions at the same time, and are reused; a forked child begins with none.

    Their number has no limit: requests that wait for each other must all be sent.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._left: list[Future[Any]] = []
        """Of a call that a signal has interrupted."""
        self._idle = _Idle()
        # Those of a client that nobody closes end with it.
        self._end = weakref.finalize(self, self._idle.end)
        self._end.atexit = False

    def run_all(
        self, functions: Sequence[Callable[[], T]], *, given_up: Callable[[], object] = lambda: None
    ) -> list[T]:
        """Runs functions at the same time, each on a thread of its own; returns when the last one has ended.

        Where a signal interrupts the call, what the functions wait for is broken off, and the signal's error is raised
        when they have ended: they may be sending from, and receiving into, memory that is used again then. The next
        call begins when the last of them has ended.

        given_up: called first where a signal has interrupted the call.
        """
        if self._process != os.getpid():
            # A forked child has none of the parent's threads.
            self._begin()
        _await(self._left)
        self._left = []
        futures: list[Future[T]] = []
        breaks: list[_Break] = []
        try:
            for function in functions:
                breaks.append(_Break())
                futures.append(self._idle.start(partial(breaks[-1].run, function)))
            _await(futures)
        except BaseException:
            self._left = [*futures]
            given_up()
            for each in breaks:
                each.set()
            wait(futures, _BREAK_S)
            raise
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the threads, as soon as their functions have ended."""
        self._end()


class _Break:
    """Ends what a function waits for."""

    def __init__(self) -> None:
        self._is_set = False
        self._stop: Callable[[], object] | None = None

    def run(self, function: Callable[[], T]) -> T:
        """Runs the function, on the thread that it is for."""
        _here.found = self
        try:
            return function()
        finally:
            _here.found = None

    def set(self) -> None:
        self._is_set = True
        if (stop := self._stop) is not None:
            stop()

    def stop_by(self, stop: Callable[[], object] | None) -> None:
        self._stop = stop
        if self._is_set and stop is not None:
            stop()


class _Here(threading.local):
    """What the function on this thread is broken off by."""

    found: _Break | None = None


_here = _Here()


def stop_by(stop: Callable[[], object] | None) -> None:
    """Says what ends the waits of the function on this thread from now on, if a signal interrupts its `run_all`.

    stop: called by another thread, at once if it was interrupted already; None where there is nothing to end any more.
    """
    if (found := _here.found) is not None:
        found.stop_by(stop)


class _Idle:
    """The threads that have nothing to do, each by the queue of its tasks. No lock, which a fork would find taken."""

    def __init__(self) -> None:
        self._queues: deque[SimpleQueue[_Task | None]] = deque()
        self._has_ended = False

    def start(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on a thread that is idle, or on a new one."""
        try:
            queue = self._queues.pop()
        except IndexError:
            queue = SimpleQueue()
            threading.Thread(target=_work, args=(queue,), name="freestep-shard", daemon=True).start()
        # Whoever waits for the outcome finds the thread idle.
        task = _Task(function, lambda: self._add(queue))
        outcome: Future[T] = task.outcome
        queue.put(task)
        return outcome

    def _add(self, queue: SimpleQueue[_Task | None]) -> None:
        self._queues.append(queue)
        if self._has_ended:
            self.end()

    def end(self) -> None:
        """Ends these threads, and the others when they become idle."""
        self._has_ended = True
        with suppress(IndexError):
            while True:
                self._queues.pop().put(None)


class _Task:
    """A function that a thread is to run. done: called just before the outcome is there."""

    def __init__(self, function: Callable[[], Any], done: Callable[[], Any] = lambda: None) -> None:
        self.outcome: Future[Any] = Future()
        self._parts: tuple[Callable[[], Any], Callable[[], Any], Future[Any]] | None = function, done, self.outcome
        self._end: Future[None] = Future()
        _busy.add(self._end)
        self._end.add_done_callback(_busy.discard)

    def __call__(self) -> None:
        self._run()
        self._end.set_result(None)

    def _run(self) -> None:
        """What it has to do with the call is free when it returns."""
        assert self._parts is not None
        (function, done, outcome), self._parts = self._parts, None
        del self.outcome
        try:
            result = function()
        except BaseException as error:
            done()
            outcome.set_exception(error)
        else:
            done()
            outcome.set_result(result)


def _work(queue: SimpleQueue[_Task | None]) -> None:
    while (task := queue.get()) is not None:
        task()


def run_in_background(name: str, function: Callable[[], T]) -> Future[T]:
    """Runs a function on a daemon thread of this name, which does not keep the process alive."""
    task = _Task(function)
    outcome: Future[T] = task.outcome
    threading.Thread(target=task, name=name, daemon=True).start()
    return outcome


def result_of(future: Future[T]) -> T:
    """The outcome of a function that is run in the background."""
    _await([future])
    return future.result()


def _await(futures: Sequence[Future[Any]]) -> None:
    """Waits until all have ended, or a signal raises: also one that came just before, which ends no wait by itself."""
    while wait(futures, LOOK_S).not_done:
        pass


def _await_busy() -> None:
    wait(list(_busy), _LAST_S)


atexit.register(_await_busy)
# A forked child has none of the threads.
os.register_at_fork(after_in_child=_busy.clear)
