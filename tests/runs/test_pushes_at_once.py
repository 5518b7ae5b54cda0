"""Small pushes of runs of one shard, whose claim and body go to Redis in one call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis

from freestep.api.control import ControlRequest
from freestep.api.models import Lease
from freestep.errors import (
    CoordinatorUnavailable,
    IdempotencyConflict,
    LeaseExpired,
    MalformedTensors,
    NonFiniteGradient,
    Overloaded,
    ProblemError,
    ShardUnavailable,
)
from freestep_service.domain.records import Ahead, Claim
from freestep_service.runs import pushes
from freestep_service.runs.known_leases import KnownLeases
from freestep_service.runs.run import Run
from in_process import (
    NUMEL,
    Bytes,
    claim_of,
    in_order,
    new_run,
    part_of,
    process,
    pull,
    push,
    run_async,
    until,
)

INLINE = {"inline_elements": NUMEL}


async def known(run: Run, worker: str = "worker") -> Lease:
    """A new lease that a push of step 0 was admitted under."""
    lease = await run.leases.grant(worker, None)
    await push(run, claim_of(lease, "first"))
    return lease


@asynccontextmanager
async def joined(
    store: str, tmp_path: Path, spec: Mapping[str, Any] | None = None, others: int = 0, **settings: Any
) -> AsyncIterator[tuple[Run, Lease]]:
    """A run whose bodies are small, and a lease that is known. others: how many have leases besides."""
    async with process(store, tmp_path / "data", **settings, **INLINE) as registry:
        run = await new_run(registry, **(spec or {}))
        for number in range(others):
            await run.leases.grant(f"other-{number}", None)
        yield run, await known(run)


def is_journaled(run: Run, key: str) -> bool:
    """Whether the journal has the body of a push that has not counted."""
    journal = run.shard(0).core.journal
    return journal is not None and journal.find(key) is not None


def first_lost(
    run: Run, *, is_made: bool = True, meanwhile: Callable[[], Awaitable[None]] | None = None
) -> list[tuple[Any, ...]]:
    """Has the first call of a small push be lost, or its answer if it is made; the calls, as they come.

    meanwhile: what happens before it is noticed.
    """
    ask, calls = run.coordinator.pushes.push, list[tuple[Any, ...]]()

    async def losing(*args: Any) -> Any:
        calls.append(args)
        answer = await ask(*args) if is_made or len(calls) > 1 else None
        if len(calls) == 1:
            if meanwhile is not None:
                await meanwhile()
            raise CoordinatorUnavailable("it was lost")
        return answer

    run.coordinator.pushes.push = losing  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize(
    ("members", "settings", "calls"),
    [
        ({}, INLINE, ["push"]),
        ({}, {"inline_elements": NUMEL - 1}, ["admit", "commit"]),
        ({"aggregation": {"policy": "ssp", "slack": 3}}, INLINE, ["admit", "commit"]),
        ({"durability": "journal"}, INLINE, ["push"]),
        ({"shards": 2}, INLINE, ["admit", "admit", "commit", "commit"]),
    ],
    ids=["small", "large", "slack", "journal", "shards"],
)
def test_redis_is_called_once_where_that_may_be(
    store: str, tmp_path: Path, members: dict[str, Any], settings: dict[str, Any], calls: list[str]
) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", **settings) as registry:
            run = await new_run(registry, **members)
            lease = await known(run)
            seen = in_order(run)
            outcomes = await push(run, claim_of(lease, "one", 1))
            assert {outcome.record.decision for outcome in outcomes} == {"applied"}
            assert seen == calls
            assert await pull(run.shard(0)) == (2, 2.0)

    run_async(work)


@pytest.mark.parametrize(
    "change",
    [
        "none",
        "a lease is granted",
        "a lease ends",
        "one runs out",
        "a worker is ended",
        "paused",
        "a later step",
        "units",
    ],
)
def test_who_may_be_refused_by_his_claim_is_looked_at_before_his_body(store: str, tmp_path: Path, change: str) -> None:
    async def work() -> None:
        async with process(store, tmp_path / "data", **INLINE) as registry:
            run = await new_run(registry)
            other = await run.leases.grant("other", 1000 if change == "one runs out" else None)
            lease = await known(run)
            claim = claim_of(lease, "one", 5 if change == "a later step" else 1)
            match change:
                case "a lease is granted":
                    await run.leases.grant("another", None)
                case "a lease ends":
                    await run.leases.release(other.lease)
                case "one runs out":
                    await until(lambda: not len(run._context.known_leases), "the end of the lease")
                case "a worker is ended":
                    await run.controls.end_worker("other", None, "me")
                case "paused":
                    await run.controls.change(ControlRequest(paused=True), "", "me")
                case "units":
                    claim = replace(claim, units={"data": (0,)})
            seen = in_order(run)
            with suppress(ProblemError):
                await push(run, claim)
            assert seen[0] == ("push" if change == "none" else "admit")

    run_async(work)


def test_a_push_that_is_too_stale_has_its_claim_looked_at_first(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with joined(store, tmp_path, {"aggregation": {"policy": "ringmaster"}}) as (run, lease):
            for step in range(1, 5):
                await push(run, claim_of(lease, f"{step}", step))
            seen = in_order(run)
            decisions = [(await push(run, claim_of(lease, key, 1)))[0].record.decision for key in ("late", "later")]
            assert (decisions, seen) == (["applied", "dropped"], ["push", "admit"])

    run_async(work)


@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_who_is_mistaken_for_admitted_is_looked_at_first_from_then_on(
    store: str, tmp_path: Path, durability: str
) -> None:
    """Redis may know better: another process, or an operator, has changed it."""

    async def work() -> None:
        async with joined(store, tmp_path, {"durability": durability}) as (run, lease):
            with Redis.from_url(store) as client:
                client.delete(f"freestep:{{run}}:lease:{lease.lease}")
            seen = in_order(run)
            for key in ("one", "two"):
                with pytest.raises(LeaseExpired):
                    await push(run, claim_of(lease, key, 1))
                assert not is_journaled(run, key)
            assert seen == ["push", "admit"]
            assert await pull(run.shard(0)) == (1, 1.0)

    run_async(work)


@pytest.mark.parametrize(
    ("soon_s", "change", "calls"),
    [(60.0, False, ["push"]), (60.0, True, ["admit", "commit"]), (0.05, False, ["admit", "commit"])],
    ids=["free soon", "changed meanwhile", "free late"],
)
def test_a_push_waits_a_moment_for_memory_before_its_claim_is_looked_at(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soon_s: float, change: bool, calls: list[str]
) -> None:
    monkeypatch.setattr(pushes, "_SOON_S", soon_s)

    async def work() -> None:
        async with joined(store, tmp_path) as (run, lease):
            pool, seen = run.shard(0).core.staging.pool, in_order(run)
            taken = [pool.try_acquire() for _ in range(pool.capacity)]
            pushing = asyncio.create_task(push(run, claim_of(lease, "one", 1)))
            await until(lambda: pool.contended, "the wait")
            if change:
                await run.leases.grant("another", None)
            if soon_s < 1.0:
                await until(lambda: seen == ["admit"], "the admission")
            for vector in taken:
                assert vector is not None
                pool.release(vector)
            await pushing
            assert seen == calls
            assert await pull(run.shard(0)) == (2, 2.0)

    run_async(work)


def test_a_push_that_is_given_up_while_it_waits_for_memory_leaves_it(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with joined(store, tmp_path) as (run, lease):
            pool = run.shard(0).core.staging.pool
            taken = [pool.try_acquire() for _ in range(pool.capacity)]
            pushing = asyncio.create_task(push(run, claim_of(lease, "one", 1)))
            await until(lambda: pool.contended, "the wait")
            pushing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pushing
            for vector in taken:
                assert vector is not None
                pool.release(vector)
            (outcome,) = await push(run, claim_of(lease, "one", 1))
            assert (outcome.record.step, outcome.replayed) == (2, False)

    run_async(work)


@pytest.mark.parametrize("durability", ["none", "checkpoint", "journal"])
@pytest.mark.parametrize("key", ["run", "receipts"])
def test_a_body_does_not_count_in_a_later_opening_of_the_run(
    store: str, tmp_path: Path, durability: str, key: str
) -> None:
    """Redis loses a key, which the push's own call finds: the run is opened where it stands, and has no such body."""

    async def work() -> None:
        async with joined(store, tmp_path, {"durability": durability}) as (run, lease):
            with Redis.from_url(store) as client:
                client.delete(f"freestep:{{run}}:{key}")
            with pytest.raises((LeaseExpired, ShardUnavailable)):
                await push(run, claim_of(lease, "one", 1))
            assert not is_journaled(run, "one")
            lease = await run.leases.grant("worker", None)
            (outcome,) = await push(run, claim_of(lease, "one", 1))
            assert (outcome.record.epoch, outcome.record.step, outcome.replayed) == (1, 2, False)
            assert await pull(run.shard(0)) == (2, 2.0)

    run_async(work)


@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_a_push_whose_entry_comes_by_the_log_before_its_answer_is_its_own(
    store: str, tmp_path: Path, durability: str
) -> None:
    async def work() -> None:
        async with joined(store, tmp_path, {"durability": durability}) as (run, lease):

            async def meanwhile() -> None:
                run._recovery.catch_up()
                await until(lambda: run.shard(0).core.writer.applied_step == 2, "the update")

            calls = first_lost(run, meanwhile=meanwhile)
            (outcome,) = await push(run, claim_of(lease, "one", 1))
            assert (outcome.record.step, outcome.replayed, len(calls)) == (2, False, 1)
            assert await pull(run.shard(0)) == (2, 2.0)

    run_async(work)


def test_a_dropped_push_whose_answer_is_lost_is_no_replay(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with joined(store, tmp_path, {"aggregation": {"policy": "sync"}}, others=1) as (run, lease):
            told: list[str] = []
            calls = first_lost(run)
            run._context.events.dropped = lambda record, claim: told.append(claim.key)  # type: ignore[method-assign]
            for is_replayed in (False, True):
                (outcome,) = await push(run, claim_of(lease, "one"))
                assert (outcome.record.decision, outcome.record.reason) == ("dropped", "duplicate-worker")
                assert outcome.replayed == is_replayed
            assert (len(calls), told) == (2, ["one"])

    run_async(work)


def test_a_push_waits_no_longer_than_for_its_turn(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with joined(store, tmp_path, queue_seconds=0.05) as (run, lease):
            pool, seen = run.shard(0).core.staging.pool, in_order(run)
            taken = [pool.try_acquire() for _ in range(pool.capacity)]
            with pytest.raises(Overloaded):
                await push(run, claim_of(lease, "one", 1))
            assert seen == ["admit", "discard"]
            for vector in taken:
                assert vector is not None
                pool.release(vector)

    run_async(work)


def test_a_lease_is_not_known_by_an_answer_from_before_it_was_forgotten() -> None:
    leases, claim = KnownLeases(), Claim("lease", 1, 0, "key")
    asked = leases.forgotten
    leases.forget()
    leases.note(claim, 1, asked)
    assert not leases.has(claim, 1)
    leases.note(claim, 1, leases.forgotten)
    assert leases.has(claim, 1)


@pytest.mark.parametrize("lost", ["call", "answer"])
def test_a_push_whose_call_or_answer_is_lost_counts_once(store: str, tmp_path: Path, lost: str) -> None:
    async def work() -> None:
        async with joined(store, tmp_path) as (run, lease):
            calls = first_lost(run, is_made=lost == "answer")
            (outcome,) = await push(run, claim_of(lease, "one"))
            assert (outcome.record.decision, outcome.replayed, len(calls)) == ("applied", False, 2)
            assert await pull(run.shard(0)) == (2, 2.0)
            (again,) = await push(run, claim_of(lease, "one"))
            assert (again.record, again.replayed) == (outcome.record, True)
            assert await pull(run.shard(0)) == (2, 2.0)

    run_async(work)


def test_a_push_that_redis_answers_late_counts_once(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with joined(store, tmp_path, commit_seconds=0.05) as (run, lease):
            ask, is_away = run.coordinator.pushes.push, True

            async def away(*args: Any) -> Any:
                if is_away:
                    raise CoordinatorUnavailable("Redis does not answer")
                return await ask(*args)

            run.coordinator.pushes.push = away  # type: ignore[method-assign]
            with pytest.raises(CoordinatorUnavailable):
                await push(run, claim_of(lease, "one"))
            is_away = False
            await until(lambda: run.shard(0).core.writer.applied_step == 2, "the update")
            (outcome,) = await push(run, claim_of(lease, "one"))
            assert (outcome.record.step, outcome.replayed) == (2, True)
            assert await pull(run.shard(0)) == (2, 2.0)

    run_async(work)


@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
@pytest.mark.parametrize("kind", ["malformed", "not finite"])
def test_a_refused_body_leaves_nothing_and_comes_after_its_claim(
    store: str, tmp_path: Path, kind: str, durability: str
) -> None:
    async def work() -> None:
        async with joined(store, tmp_path, {"durability": durability}) as (run, lease):
            seen, shard = in_order(run), run.shard(0)
            nan = part_of(run, 0, torch.full((NUMEL,), float("nan")))
            body, refusal = {
                "malformed": (Bytes(b"\xff" * nan.length), MalformedTensors),
                "not finite": (nan, NonFiniteGradient),
            }[kind]
            with pytest.raises(refusal):
                await shard.push(claim_of(lease, "one"), body)
            assert seen == ["admit", "discard"]
            with Redis.from_url(store) as client:
                assert client.hlen("freestep:{run}:pending") == 0
            assert not is_journaled(run, "one")
            await run.leases.release(lease.lease)
            with pytest.raises(LeaseExpired):
                await shard.push(claim_of(lease, "one"), body)
            pool = shard.core.staging.pool
            assert all(pool.try_acquire() for _ in range(pool.capacity))

    run_async(work)


@pytest.mark.parametrize("kind", ["other", "malformed", "not finite"])
def test_a_key_that_comes_again_with_another_body_is_a_conflict(store: str, tmp_path: Path, kind: str) -> None:
    async def work() -> None:
        async with joined(store, tmp_path) as (run, lease):
            await push(run, claim_of(lease, "one"))
            value = {"other": -2.0, "not finite": float("nan")}.get(kind, 0.0)
            body = part_of(run, 0, torch.full((NUMEL,), value))
            if kind == "malformed":
                body = Bytes(b"\xff" * body.length)
            with pytest.raises(IdempotencyConflict):
                await run.shard(0).push(claim_of(lease, "one"), body)
            (again,) = await push(run, claim_of(lease, "one"))
            assert again.replayed
            assert await pull(run.shard(0)) == (2, 2.0)

    run_async(work)


def test_a_policy_that_has_just_got_a_slack_has_the_push_sent_again(store: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with joined(store, tmp_path) as (run, lease):
            ask = run.coordinator.pushes.push

            async def ahead(*args: Any) -> Any:
                raise Ahead

            run.coordinator.pushes.push = ahead  # type: ignore[method-assign]
            with pytest.raises(Overloaded):
                await push(run, claim_of(lease, "one"))
            run.coordinator.pushes.push = ask  # type: ignore[method-assign]
            (outcome,) = await push(run, claim_of(lease, "one"))
            assert (outcome.record.step, outcome.replayed) == (2, False)

    run_async(work)


def test_a_run_that_is_not_open_refuses_at_once(store: str, tmp_path: Path) -> None:
    """Redis has answered, so nothing of the push can be on its way."""

    async def work() -> None:
        async with joined(store, tmp_path, commit_seconds=3600.0) as (run, lease):
            with Redis.from_url(store) as client:
                client.hset("freestep:{run}:run", "phase", "gather")
            with pytest.raises(ProblemError) as refused:
                await run.shard(0).push(claim_of(lease, "one"), part_of(run, 0, torch.ones(NUMEL)))
            assert refused.value.slug == "shard-unavailable"

    run_async(work)
