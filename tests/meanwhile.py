"""Calls at the same moment, calls under way, and waiting for what others do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def at_once(*calls: Callable[[], T]) -> list[T]:
    """Makes calls at the same moment, in threads of their own; returns what they return."""
    start = threading.Barrier(len(calls))

    def make(call: Callable[[], T]) -> T:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(make, call) for call in calls]]


def under_way(call: Callable[[], T]) -> Future[T]:
    """Begins a call in a thread of its own; what it returns or raises is its future's."""
    future: Future[T] = Future()

    def make() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=make).start()
    return future


def wait_until(condition: Callable[[], bool], pause_s: float = 0.005) -> None:
    """Asks again and again, with pauses in which those who are waited for, perhaps in this process, get on."""
    pause = threading.Event()
    while not condition():
        pause.wait(pause_s)
