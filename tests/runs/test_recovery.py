"""The wrapper around calls to Redis, and the lock with a watchdog."""

from __future__ import annotations

import asyncio

import pytest

from freestep.errors import ShardUnavailable, StorageUnavailable
from freestep_service.domain.records import Behind, Fenced
from freestep_service.runs.recovery import Recovery
from freestep_service.runs.watched_lock import WatchedLock
from in_process import (
    run_async,
    until,
)


def test_a_call_that_finds_redis_behind_waits_for_the_opening_and_is_made_again() -> None:
    async def work() -> None:
        recovery, answers = Recovery("run", 30), iter([Behind(), "answer"])

        async def ask() -> str:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        asked = asyncio.create_task(recovery.call(ask))
        await until(lambda: recovery.must_reopen, "the signal")
        assert recovery.wanted.is_set()
        assert not asked.done()
        recovery.reopened()
        assert await asked == "answer"
        assert not recovery.must_reopen

    run_async(work)


def test_callers_that_find_redis_behind_together_open_it_once() -> None:
    async def work() -> None:
        recovery, behind = Recovery("run", 30), [True]

        async def ask() -> str:
            await asyncio.sleep(0)
            if behind[0]:
                raise Behind
            return "answer"

        asked = [asyncio.create_task(recovery.call(ask)) for _ in range(5)]
        await until(lambda: recovery.must_reopen, "the signal")
        behind[0] = False
        recovery.reopened()
        assert await asyncio.gather(*asked) == ["answer"] * 5
        assert not recovery.must_reopen

    run_async(work)


def test_an_opening_that_fails_is_raised_and_one_that_does_not_come_is_refused() -> None:
    async def ask() -> None:
        raise Behind

    async def work() -> None:
        recovery = Recovery("run", 0.05)
        with pytest.raises(ShardUnavailable, match="still being opened"):
            await recovery.call(ask)
        asked = asyncio.create_task(recovery.call(ask))
        await asyncio.sleep(0)
        recovery.reopened(StorageUnavailable("full"))
        with pytest.raises(StorageUnavailable):
            await asked

    run_async(work)


def test_a_call_that_is_fenced_has_the_keeper_look() -> None:
    async def ask() -> None:
        raise Fenced

    async def work() -> None:
        recovery = Recovery("run", 30)
        with pytest.raises(ShardUnavailable):
            await recovery.call(ask)
        assert recovery.wanted.is_set()

    run_async(work)


def test_a_call_about_a_run_that_is_deleted_waits_for_no_opening() -> None:
    async def ask() -> None:
        raise Behind

    async def work() -> None:
        recovery = Recovery("run", 30)
        recovery.is_deleted = True
        with pytest.raises(ShardUnavailable, match="is being deleted"):
            await recovery.call(ask)
        assert not recovery.must_reopen

    run_async(work)


def test_a_lock_that_is_held_for_long_says_by_whom(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        lock = WatchedLock("run one", bound_s=0.01)
        async with lock("a restore"):
            await until(lambda: "run one: a restore has taken more than 0.01 s" in caplog.text, "the line")
        assert not lock.locked()

    run_async(work)
