"""Calls at the same moment, calls under way, and waits for what others do; every wait has a deadline and a reason."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

__all__ = ["DEADLINE_S", "Call", "at_once", "end", "under_way", "wait_for", "wait_until"]

T = TypeVar("T")

DEADLINE_S = 120.0
"""After which a wait fails: longer than what is waited for takes on a busy machine, shorter than pytest's timeout."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.1


class Call(Future[T]):
    """A call under way in a thread; its result is waited for until the deadline."""

    def result(self, timeout: float | None = DEADLINE_S) -> T:
        return super().result(timeout)


def under_way(call: Callable[[], T]) -> Call[T]:
    """Begins a call in a thread of its own; what it returns or raises is its future's."""
    future: Call[T] = Call()

    def make() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # One that hangs must not keep the tests from ending.
    threading.Thread(target=make, daemon=True).start()
    return future


def at_once(*calls: Callable[[], T]) -> list[T]:
    """Makes calls at the same moment, in threads of their own; returns what they return, once all have ended."""
    start = threading.Barrier(len(calls), timeout=DEADLINE_S)

    def make(call: Callable[[], T]) -> T:
        start.wait()
        return call()

    running = [under_way(lambda call=call: make(call)) for call in calls]  # type: ignore[misc]
    wait(running, DEADLINE_S)
    return [each.result(0) for each in running]


def wait_until(condition: Callable[[], bool], pause_s: float | None = None, deadline_s: float = DEADLINE_S) -> None:
    """Asks again and again. Raises TimeoutError with the condition's source after `deadline_s`.

    pause_s: between two questions. Unless it is given, the pauses grow with the time waited, to at most a tenth of
        it: questions cost the time of those who are waited for.
    """
    begun, pause = time.monotonic(), threading.Event()
    while not condition():
        waited = time.monotonic() - begun
        if waited > deadline_s:
            raise TimeoutError(f"not so after {deadline_s:g} s: {inspect.getsource(condition).strip()}")
        pause.wait(pause_s or min(max(_SHORTEST_PAUSE_S, waited / 10), _LONGEST_PAUSE_S))


def wait_for(event: threading.Event, reason: str) -> None:
    """Waits for an event. Raises TimeoutError with the reason after DEADLINE_S."""
    if not event.wait(DEADLINE_S):
        raise TimeoutError(f"not so after {DEADLINE_S:g} s: {reason}")


def end(thread: threading.Thread) -> None:
    """Waits for the end of a thread. Raises TimeoutError after DEADLINE_S."""
    thread.join(DEADLINE_S)
    if thread.is_alive():
        raise TimeoutError(f"{thread.name} has not ended after {DEADLINE_S:g} s")
