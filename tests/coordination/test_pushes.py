"""Pushes are admitted and committed by scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from coordination.driven import ASYNC, DrivenRun
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import (
    Admission,
    RunState,
)

Make = Callable[..., DrivenRun]


def test_a_push_is_committed_once_all_shards_have_staged_it(run: DrivenRun) -> None:
    lease = run.grant()
    claim = replace(run.claim(lease, "key"), speed=2.5)
    shards = range(run.shards)
    assert all(run.is_admitted(claim, shard) for shard in shards)
    before = run.number("seq")
    answers = [run.commit(claim, shard) for shard in shards]
    assert answers[:-1] == [None] * (run.shards - 1)
    record = answers[-1]
    assert record is not None
    assert (before, record.seq, record.step, record.decision, record.worker) == (0, 1, 1, "applied", "w")
    assert record.norm == f"{run.shards**0.5:.17g}"
    assert record.digests == {f"{10 * shard}-{10 * shard + 10}": f"digest-{shard}" for shard in shards}
    [entry] = run.entries()
    assert (entry["key"], entry["seq"], entry["step"], entry["advance"]) == ("key", 1, 1, True)
    assert (run.number("seq"), run.number("step"), run.number("applied")) == (1, 1, 1)
    [worker] = run.do(run.leases.workers())
    assert (worker.pushes, worker.speed, worker.received_bytes) == (1, 2.5, 40 * run.shards)
    # Every shard gets the same answer, and so does a repeated call.
    before_again = run.dump()
    assert [run.commit(claim, shard) for shard in shards] == [record] * run.shards
    assert run.admit(claim).record == record
    assert run.admit(claim).replayed
    assert run.dump() == before_again


@pytest.mark.parametrize("outcome", ["applied", "accumulated", "stale", "duplicate-worker", "replay", "pending"])
def test_one_call_does_what_admission_and_commit_do(make_run: Make, outcome: str) -> None:
    policy = {
        "accumulated": Policy("2", "none", distinct=False),
        "stale": Policy("1", "0", distinct=False),
        "duplicate-worker": Policy("2", "none", distinct=True),
    }.get(outcome, ASYNC)
    records, left = [], []
    for at_once in (False, True):
        run = DrivenRun(make_run().driver, 1, policy).open()
        lease = run.grant()
        run.grant("another")
        earlier = "key" if outcome == "replay" else "earlier"
        if outcome in ("stale", "duplicate-worker", "replay"):
            run.push(run.claim(lease, earlier))
        claim = run.claim(lease, "key")
        if outcome == "pending":
            run.admit(claim)
        if at_once:
            records.append(run.push_at_once(claim))
        else:
            admission = Admission() if outcome == "pending" else run.admit(claim)
            records.append(admission.record or run.commit(claim))
        counted = ("seq", "step", "applied", "accumulated", "dropped", "grouped", "in_flight")
        left.append({name: run.number(name) for name in counted})
        left[-1]["pending"] = run.redis.hlen(run.key("pending"))
        left[-1]["receipts"] = sorted(run.redis.hkeys(run.key("receipts")))
    plain = [replace(record, claim="") for record in records]
    assert plain[0] == plain[1]
    assert left[0] == left[1]
    assert outcome in (plain[0].decision, plain[0].reason, "replay", "pending")


def test_a_digest_is_found_whatever_the_run_was_divided_into_since(make_run: Make) -> None:
    run = make_run(2).open()
    claim = run.claim(run.grant(), "key")
    first = run.push(claim)
    run.do(run.opening.gather(2, resharding=1))
    run.do(run.opening.reshard(run.number("generation"), 1))
    run.shards = 1
    run.take_all()
    run.reopen(RunState(2, 1, 1, initialized=True, receipts={"key": first}))
    replayed = run.admit(claim).record
    assert replayed == first
    assert (replayed.digest_of(10, 20), replayed.digest_of(0, 20)) == ("digest-1", None)


def test_a_part_that_an_older_version_staged_has_its_digest_by_shard(make_run: Make) -> None:
    run = make_run(2).open()
    claim = run.claim(run.grant(), "key")
    run.admit(claim, 0)
    run.admit(claim, 1)
    run.commit(claim, 0)
    staged = str(run.redis.hget(run.key("staged"), "key"))
    run.redis.hset(run.key("staged"), "key", staged.replace('"range":"0-10",', "").replace(',"range":"0-10"', ""))
    record = run.commit(claim, 1)
    assert record is not None
    assert record.digests == {"0": "digest-0", "10-20": "digest-1"}


def test_a_group_is_gathered_before_it_is_applied(make_run: Make) -> None:
    run = make_run(policy=Policy("2", "none", distinct=False)).open()
    lease = run.grant()
    first = run.push(run.claim(lease, "a"))
    assert (first.decision, first.step, run.number("grouped")) == ("accumulated", 0, 1)
    assert run.redis.hgetall(run.key("group")) == {"w": "1"}
    second = run.push(run.claim(lease, "b"))
    assert (second.decision, second.step, run.number("grouped")) == ("applied", 1, 0)
    assert not run.redis.exists(run.key("group"))


def test_an_update_of_all_live_workers_waits_for_each(make_run: Make) -> None:
    run = make_run(policy=Policy("live", "0", distinct=True)).open()
    one, two = run.grant("one"), run.grant("two")
    assert run.push(run.claim(one, "a")).decision == "accumulated"
    again = run.push(run.claim(one, "b"))
    assert (again.decision, again.reason, again.seq) == ("dropped", "duplicate-worker", 0)
    assert run.push(run.claim(two, "c")).decision == "applied"
    late = run.admit(run.claim(one, "d"))
    assert (late.record.decision, late.record.reason, late.record.staleness) == ("dropped", "stale", 1)
    assert run.number("dropped") == 2


def test_a_stale_push_is_dropped_when_it_is_committed_too(run: DrivenRun) -> None:
    fresh = DrivenRun(run.driver, run.shards, Policy("1", "0", distinct=False)).open()
    lease = fresh.grant()
    late = fresh.claim(lease, "late")
    for shard in range(fresh.shards):
        fresh.admit(late, shard)
    fresh.push(fresh.claim(lease, "first"))
    answers = [fresh.commit(late, shard) for shard in range(fresh.shards)]
    record = answers[-1]
    assert record is not None
    assert (record.decision, record.reason, record.seq, fresh.number("seq")) == ("dropped", "stale", 0, 1)


def test_the_newest_receipts_of_a_lease_are_kept(run: DrivenRun) -> None:
    lease = run.grant()
    for number in range(64):
        run.push(run.claim(lease, f"key-{number}"))
    claim = run.claim(lease, "one more")
    for shard in range(run.shards):
        run.admit(claim, shard)
    for shard in range(run.shards):
        answer = run.commit_part(claim, shard, run.part(shard))
    assert answer is not None
    assert answer[1] == ["key-0"]
    window = run.redis.lrange(run.key(f"window:{lease.lease}"), 0, -1)
    assert (len(window), window[0], window[-1]) == (64, "key-1", "one more")
    assert set(run.receipts()) == set(window)
    assert run.entries()[-1]["evicted"] == ["key-0"]
