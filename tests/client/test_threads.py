"""Threads for functions that run at the same time."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import Future, wait
from typing import Any

import pytest

from freestep.threads import Threads, _await_busy, run_in_background
from meanwhile import DEADLINE_S, wait_for, wait_until


def test_functions_that_wait_for_each_other_all_run() -> None:
    threads = Threads()
    barrier = threading.Barrier(40, timeout=DEADLINE_S)
    assert sorted(threads.run_all([barrier.wait] * 40)) == list(range(40))
    threads.close()


def test_a_thread_is_used_again() -> None:
    threads = Threads()
    barrier = threading.Barrier(2, timeout=DEADLINE_S)

    def ident() -> int:
        barrier.wait()
        return threading.get_ident()

    first = set(threads.run_all([ident] * 2))
    for _ in range(100):
        assert set(threads.run_all([ident] * 2)) == first
    threads.close()


def test_a_call_that_was_interrupted_is_over_before_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads()
    goes_on = threading.Event()
    order: list[str] = []

    def old() -> None:
        wait_for(goes_on, "the next call waits")
        order.append("old")

    def waiting(futures: list[Future[None]], timeout: float | None = None) -> Any:
        if futures and not left:
            left.extend(futures)
            raise KeyboardInterrupt
        if left and futures == left:
            goes_on.set()
        done = wait(futures, timeout)
        if futures:
            goes_on.set()
        return done

    left: list[Future[None]] = []
    monkeypatch.setattr("freestep.threads.wait", waiting)
    with pytest.raises(KeyboardInterrupt):
        threads.run_all([old] * 2)
    threads.run_all([lambda: order.append("new")] * 2)
    assert order == ["old", "old", "new", "new"]
    threads.close()


def test_an_error_is_raised_when_all_have_ended() -> None:
    threads = Threads()
    ended = threading.Event()
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise ValueError("no")

    def end() -> None:
        assert failed.wait(DEADLINE_S)
        ended.set()

    with pytest.raises(ValueError, match="no"):
        threads.run_all([fail, end])
    assert ended.is_set()
    threads.close()


@pytest.mark.parametrize("is_closed", [True, False])
def test_threads_end_when_they_are_closed_or_collected(is_closed: bool) -> None:
    threads = Threads()
    running = threads.run_all([threading.current_thread] * 3)
    if is_closed:
        threads.close()
        # Those that come later end with their functions.
        running += threads.run_all([threading.current_thread])
    else:
        del threads
        gc.collect()
    wait_until(lambda: not any(each.is_alive() for each in running))


@pytest.mark.parametrize("is_background", [True, False])
def test_a_process_that_ends_waits_until_threads_have_freed_what_they_were_given(is_background: bool) -> None:
    begins, ends, freed = threading.Event(), threading.Event(), threading.Event()

    class Given:
        def __call__(self) -> None:
            assert begins.wait(DEADLINE_S)

        def __del__(self) -> None:
            # As a tensor's memory: in code that aborts the process if the interpreter is gone when it comes back.
            assert ends.wait(DEADLINE_S)
            freed.set()

    threads = Threads()
    outcome = run_in_background("freestep-test", Given()) if is_background else threads._idle.start(Given())
    # Now the thread alone has it.
    begins.set()
    outcome.result(DEADLINE_S)
    assert not freed.is_set()
    timer = threading.Timer(0.05, ends.set)
    timer.start()
    _await_busy()
    assert freed.is_set()
    timer.join()
    threads.close()
