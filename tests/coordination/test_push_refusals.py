"""Pushes are refused, lost and discarded, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordination.driven import HOUR, DrivenRun
from freestep.errors import (
    EpochChanged,
    IdempotencyConflict,
    LeaseExpired,
    MalformedRequest,
    MalformedTensors,
    NonFiniteGradient,
    RunNotInitialized,
    ShardUnavailable,
)
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import (
    Ahead,
    Behind,
    Claim,
    Fenced,
    LogPosition,
    Lost,
    Pending,
    RunState,
    StagedPart,
)

Make = Callable[..., DrivenRun]


def refusals(run: DrivenRun) -> list[tuple[Claim, type[Exception]]]:
    lease, fenced = run.grant(), run.grant("other")
    run.grant("other")
    run.push(run.claim(lease, "used"))
    return [
        (run.claim(lease, "used", 1), IdempotencyConflict),
        (run.claim(fenced, "new"), LeaseExpired),
        (replace(run.claim(lease, "new"), token=lease.token + 1), LeaseExpired),
        (replace(run.claim(lease, "new"), lease="0" * 32), LeaseExpired),
        (run.claim(lease, "new", step=2), MalformedRequest),
    ]


def test_a_claim_is_refused(run: DrivenRun) -> None:
    for claim, refusal in refusals(run):
        before = run.dump()
        with pytest.raises(refusal):
            run.admit(claim)
        with pytest.raises(refusal):
            run.do(run.pushes.precheck(claim))
        assert run.dump() == before


def test_what_could_be_admitted_passes_the_check(run: DrivenRun) -> None:
    lease = run.grant()
    run.push(run.claim(lease, "used"))
    before = run.dump()
    run.do(run.pushes.precheck(run.claim(lease, "used")))
    run.do(run.pushes.precheck(run.claim(lease, "new", 1)))
    assert run.dump() == before


@pytest.mark.parametrize("call", ["admit", "commit", "push"])
def test_calls_for_a_shard_are_refused_without_its_token(run: DrivenRun, call: str) -> None:
    claim, owner = run.claim(run.grant(), "key"), run.owner()
    run.admit(claim)

    def called(position: LogPosition, token: str) -> None:
        changed = owner._replace(position=position, token=token)
        calls: dict[str, Callable[[], Any]] = {
            "admit": lambda: run.pushes.admit(claim, changed),
            "commit": lambda: run.pushes.commit(claim, changed, run.part(), None, run.attempt(claim)),
            "push": lambda: run.pushes.push(claim, changed, run.part(), None, run.number("generation")),
        }
        run.do(calls[call]())

    before = run.dump()
    with pytest.raises(Behind):
        called(LogPosition(1, 1), owner.token)
    with pytest.raises(Behind):
        called(LogPosition(2, 0), owner.token)
    with pytest.raises(Fenced):
        called(run.position, "1")
    assert run.dump() == before
    run.do(run.opening.give_up([owner]))
    with pytest.raises(ShardUnavailable) as refused:
        called(run.position, owner.token)
    assert refused.value.extensions == {"missing": [0]}


def test_a_push_before_the_weights_is_refused(make_run: Make) -> None:
    run = make_run().open(initialized=False)
    with pytest.raises(RunNotInitialized):
        run.admit(run.claim(run.grant(), "key"))


def test_a_push_that_another_request_carries_is_pending(make_run: Make) -> None:
    run = make_run().open()
    claim = run.claim(run.grant(), "key")
    run.admit(claim)
    with pytest.raises(Pending):
        run.admit(claim)
    with pytest.raises(IdempotencyConflict):
        run.admit(replace(claim, samples=2.0))


def test_a_worker_that_is_too_far_ahead_waits(run: DrivenRun) -> None:
    ssp = DrivenRun(run.driver, run.shards, Policy("1", "none", False, slack="1")).open()
    fast, slow = ssp.grant("fast"), ssp.grant("slow")
    for number in range(2):
        ssp.push(ssp.claim(fast, f"key-{number}"))
    with pytest.raises(Ahead):
        ssp.admit(ssp.claim(fast, "key-2"))
    ssp.push(ssp.claim(slow, "slow"))
    assert ssp.is_admitted(ssp.claim(fast, "key-2"))


def test_a_gradient_whose_norm_over_all_shards_is_too_large_is_refused(run: DrivenRun) -> None:
    claim = run.claim(run.grant(), "key")
    for shard in range(run.shards):
        run.admit(claim, shard)
    with pytest.raises(NonFiniteGradient):
        for shard in range(run.shards):
            run.commit(claim, shard, largest_norm=0.9 * run.shards**0.5)
    assert (run.number("seq"), run.redis.hlen(run.key("pending")), run.number("in_flight")) == (0, 0, 0)
    with pytest.raises(Lost) as lost:
        run.commit(claim)
    assert lost.value.place == (1, 0)
    run.push(run.claim(run.grant("other"), "next"))
    with pytest.raises(Lost) as lost:
        run.commit(claim)
    assert lost.value.place == (1, 1)


@pytest.mark.parametrize("ended", ["lease", "epoch"])
def test_a_push_is_not_committed_under_a_lease_that_has_ended(run: DrivenRun, ended: str) -> None:
    lease = run.grant()
    claim = run.claim(lease, "key")
    for shard in range(run.shards):
        run.admit(claim, shard)
    if ended == "lease":
        run.pass_time(HOUR)
        run.heartbeat()
    else:
        run.redis.hset(run.key(f"lease:{lease.lease}"), "epoch", 0)
    with pytest.raises(LeaseExpired if ended == "lease" else EpochChanged):
        for shard in range(run.shards):
            run.commit(claim, shard)
    assert (run.number("seq"), run.redis.hlen(run.key("pending")), run.number("in_flight")) == (0, 0, 0)


def test_a_push_is_lost_when_the_run_is_opened_again(run: DrivenRun) -> None:
    claim = run.claim(run.grant(), "key")
    for shard in range(run.shards):
        run.admit(claim, shard)
    run.do(run.opening.gather(run.shards))
    run.reopen(RunState(1, initialized=True))
    with pytest.raises(Lost):
        run.commit(claim)
    assert run.is_admitted(claim)


# What is discarded


def test_a_part_that_did_not_come_may_come_again(run: DrivenRun) -> None:
    claim = run.claim(run.grant(), "key")
    run.admit(claim)
    run.discard(claim)
    assert (run.redis.hlen(run.key("pending")), run.redis.hlen(run.key("staged"))) == (0, 0)
    assert run.number("in_flight") == 0
    run.discard(claim)
    assert run.number("in_flight") == 0
    assert run.push(claim).decision == "applied"


def test_a_refused_part_is_refused_on_all_shards(make_run: Make) -> None:
    run = make_run(3).open()
    claim = run.claim(run.grant(), "key")
    run.admit(claim, 0)
    run.admit(claim, 1)
    run.discard(claim, 1, "malformed-tensors", "why")
    with pytest.raises(Lost):
        run.commit(claim, 0)
    with pytest.raises(MalformedTensors, match="why"):
        run.admit(claim, 2)
    # All parts have come, so nothing is left of the refusal, and the key may be used again.
    assert (run.redis.hlen(run.key("pending")), run.redis.hlen(run.key("staged"))) == (0, 0)
    assert run.push(claim).decision == "applied"


def test_a_shard_whose_owner_changed_has_to_stage_its_part_again(make_run: Make) -> None:
    run = make_run(2).open()
    claim = run.claim(run.grant(), "key")
    run.admit(claim, 0)
    run.admit(claim, 1)
    assert run.commit(claim, 0) is None
    run.redis.hset(run.key("shards"), "0:token", "99")
    assert run.commit(claim, 1) is None
    record = run.commit_part(claim, 0, StagedPart(0, 10, "again", 1.0, 40))
    assert record is not None
    assert record[0].digests == {"0-10": "again", "10-20": "digest-1"}
