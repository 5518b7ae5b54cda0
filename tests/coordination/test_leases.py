"""Leases are granted, renewed, released and ended by scripts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordination.driven import HOUR, DrivenRun
from freestep.errors import EpochChanged, LeaseExpired, ShardUnavailable
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import Behind, LogPosition, RunState

Make = Callable[..., DrivenRun]
SYNC = Policy("live", "0", distinct=True)


def test_a_lease_is_listed_while_it_lives(run: DrivenRun) -> None:
    first, second = run.grant("b"), run.grant("a")
    assert (first.epoch, first.step, first.ttl_ms) == (1, 0, HOUR)
    assert second.token > first.token
    assert [worker.worker for worker in run.do(run.leases.workers())] == ["a", "b"]
    run.pass_time(HOUR)
    assert run.do(run.leases.workers()) == []


def test_a_renewed_lease_lives_on(run: DrivenRun) -> None:
    lease = run.grant()
    for _ in range(3):
        run.pass_time(HOUR - 60_000)
        assert run.do(run.leases.renew(lease.lease)) == lease
    run.pass_time(HOUR)
    with pytest.raises(LeaseExpired):
        run.do(run.leases.renew(lease.lease))


def test_a_newer_lease_of_a_worker_fences_off_the_older_one(run: DrivenRun) -> None:
    older, newer = run.grant(), run.grant()
    assert newer.token > older.token
    assert run.do(run.leases.workers())[0].lease == newer.lease
    with pytest.raises(LeaseExpired):
        run.do(run.leases.renew(older.lease))
    with pytest.raises(LeaseExpired):
        run.do(run.leases.release(older.lease, run.position))
    assert run.do(run.leases.renew(newer.lease)) == newer


def test_tokens_rise_over_a_loss_of_redis(run: DrivenRun) -> None:
    lease = run.grant()
    run.redis.delete(*run.dump())
    with pytest.raises(Behind):
        run.grant()
    run.do(run.opening.gather(run.shards))
    with pytest.raises(Behind):
        run.grant()
    run.take_all()
    run.reopen(RunState(1, initialized=True))
    assert run.grant().token > lease.token


def test_tokens_rise_where_the_clock_does_not(run: DrivenRun) -> None:
    ahead = run.grant("a").token + HOUR
    run.redis.hset(run.key("run"), "token", ahead)
    assert [run.grant(worker).token for worker in "abb"] == [ahead + 1, ahead + 2, ahead + 3]


def test_a_lease_of_an_earlier_epoch_is_not_renewed(run: DrivenRun) -> None:
    lease = run.grant()
    run.do(run.opening.gather(run.shards))
    run.reopen(RunState(2, initialized=True))
    with pytest.raises(EpochChanged) as refused:
        run.do(run.leases.renew(lease.lease))
    assert refused.value.extensions == {"epoch": 2}


def test_no_lease_is_granted_before_the_run_is_open(run: DrivenRun) -> None:
    run.do(run.opening.gather(run.shards))
    with pytest.raises(ShardUnavailable):
        run.grant()
    run.do(run.opening.give_up([run.owner()]))
    with pytest.raises(ShardUnavailable) as refused:
        run.grant()
    assert refused.value.extensions == {"missing": [0]}


def test_leases_are_not_renewed_in_a_run_that_redis_has_lost(run: DrivenRun) -> None:
    lease = run.grant()
    run.redis.delete(run.key("run"))
    before = run.dump()
    with pytest.raises(LeaseExpired):
        run.do(run.leases.renew(lease.lease))
    assert run.dump() == before
    run.do(run.opening.gather(run.shards))
    with pytest.raises(ShardUnavailable):
        run.do(run.leases.renew(lease.lease))


def test_a_released_lease_is_over(run: DrivenRun) -> None:
    lease = run.grant()
    run.push(run.claim(lease, "key"))
    with pytest.raises(Behind):
        run.do(run.leases.release(lease.lease, LogPosition(1, 2)))
    _, ended = run.do(run.leases.release(lease.lease, run.position))
    assert (ended.seq, ended.evicted) == (0, [])
    assert run.redis.lrange(run.key("ended"), 0, -1) == ["key"]
    assert run.do(run.leases.workers()) == []
    with pytest.raises(LeaseExpired):
        run.do(run.leases.release(lease.lease, run.position))


def test_leases_that_ran_out_are_ended(run: DrivenRun) -> None:
    short, long = run.grant("short", HOUR // 2), run.grant("long")
    run.push(run.claim(short, "key"))
    live, left_ms, ended = run.expire()
    assert (live, ended) == (2, None)
    assert 0 < left_ms <= HOUR // 2
    run.pass_time(HOUR // 2)
    live, left_ms, ended = run.expire()
    assert (live, ended is None, ended and ended.seq) == (1, False, 0)
    assert run.redis.lrange(run.key("ended"), 0, -1) == ["key"]
    assert run.expire()[2] is None
    assert run.do(run.leases.renew(long.lease)).token == long.token


def test_ending_leases_is_refused_where_redis_is_behind(run: DrivenRun) -> None:
    run.grant()
    run.pass_time(HOUR)
    before = run.dump()
    with pytest.raises(Behind):
        run.do(run.leases.expire(LogPosition(1, 1), HOUR))
    assert run.dump() == before


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_update_is_completed_when_the_worker_leaves_that_it_waited_for(
    make_run: Make, shards: int, released: bool
) -> None:
    run = make_run(shards, policy=SYNC).open()
    stays, leaves = run.grant("stays", HOUR), run.grant("leaves", HOUR // 2)
    assert run.push(run.claim(stays, "key")).decision == "accumulated"
    if released:
        _, ended = run.do(run.leases.release(leaves.lease, run.position))
    else:
        run.pass_time(HOUR // 2)
        _, _, ended = run.expire()
    assert (ended.seq, ended.step, ended.epoch) == (2, 1, 1)
    assert (run.number("seq"), run.number("step"), run.number("grouped")) == (2, 1, 0)
    assert not run.redis.exists(run.key("group"))
    assert [(entry["seq"], entry["advance"]) for entry in run.entries()] == [(1, False), (2, True)]
    assert run.entries()[1]["closed_by"] == ("leaves" if released else "expiry")


def test_an_update_whose_last_worker_was_lost_with_redis_is_completed(make_run: Make) -> None:
    run = make_run(policy=SYNC).open()
    stays = run.grant("stays")
    run.grant("lost")
    run.push(run.claim(stays, "key"))
    run.redis.zrem(run.key("leases"), "lost")
    live, _, ended = run.expire()
    assert (live, ended.seq, ended.step) == (1, 2, 1)


def test_keys_of_ended_leases_are_evicted_beyond_their_number(run: DrivenRun) -> None:
    lease = run.grant()
    run.redis.rpush(run.key("ended"), *(f"old-{number}" for number in range(4096)))
    run.push(run.claim(lease, "key"))
    _, ended = run.do(run.leases.release(lease.lease, run.position))
    assert ended.evicted == ["old-0"]
    assert run.redis.lindex(run.key("ended"), -1) == "key"


def test_the_newest_receipt_of_each_lease_outlives_the_older_ones_of_others(make_run: Make) -> None:
    run = make_run().open()
    claims = []
    # As where all workers are cut off: more keys than are kept, and in one call as many as it evicts.
    for number in range(80):
        lease = run.grant(f"worker-{number}")
        run.redis.rpush(run.key(f"window:{lease.lease}"), *(f"older-{number}-{place}" for place in range(62)))
        for place in ("last-but-one", "last"):
            claims.append(run.claim(lease, f"{number}-{place}"))
            run.push(claims[-1])
    run.pass_time(HOUR)
    _, _, ended = run.expire()
    assert len(ended.evicted) == 80 * 64 - 4096
    # Who has had no answer sends the push again, and would make another of it after a refusal.
    assert all(run.admit(claim).replayed for claim in claims)


def test_a_push_under_a_lease_that_ends_is_refused(make_run: Make) -> None:
    run = make_run(3).open()
    claim = run.claim(run.grant(), "key")
    run.admit(claim, 0)
    run.pass_time(HOUR)
    run.expire()
    assert (run.redis.hlen(run.key("pending")), run.redis.hlen(run.key("staged"))) == (0, 0)
    assert run.number("in_flight") == 0
