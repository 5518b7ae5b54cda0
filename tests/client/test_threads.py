"""Threads for functions that run at the same time."""

from __future__ import annotations

import gc
import threading

import pytest

from freestep.threads import Threads
from meanwhile import DEADLINE_S, wait_until


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
