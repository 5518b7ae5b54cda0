"""One key of a run is lost while the others are there: it was evicted, deleted by hand, or it expired."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordination.driven import DrivenRun
from freestep.api.data import DataSpec
from freestep.api.models import Lease
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.records import Behind, Pending, RunState
from freestep_service.domain.reports import Measured

Make = Callable[..., DrivenRun]


def test_a_push_does_not_count_twice_where_receipts_are_lost(run: DrivenRun) -> None:
    claim = run.claim(run.grant(), "key")
    record = run.push(claim)
    run.redis.delete(run.key("receipts"))
    # The newest seq that the shard knows is Redis's: nothing else tells of the loss.
    run.position = run.position._replace(seq=record.seq)
    for call in (run.admit, run.commit):
        with pytest.raises(Behind):
            call(claim)
    with pytest.raises(Behind):
        run.do(run.log.mark_checkpoint(run.owner()))
    generation = run.number("generation")
    run.do(run.opening.gather(run.shards, generation))
    run.reopen(RunState(1, step=record.step, seq=record.seq, initialized=True, receipts={"key": record}))
    admission = run.admit(claim)
    assert admission.replayed
    assert admission.record == record


def test_a_report_does_not_count_twice_where_metrics_are_lost(run: DrivenRun) -> None:
    """A learning rate that follows a metric would fall twice."""

    def report(value: float = 0.5) -> bool:
        return run.do(run.log.report_metric(run.owner(), Measured("loss", 0, value), None))[1] is not None

    # There are none to be lost.
    run.redis.delete(run.key("metrics"))
    assert [report(), report()] == [True, False]
    run.redis.delete(run.key("metrics"))
    for call in (report, lambda: run.admit(run.claim(run.grant(), "key"))):
        with pytest.raises(Behind):
            call()
    run.do(run.opening.gather(run.shards, run.number("generation")))
    run.reopen(RunState(1, seq=1, initialized=True, reported={"loss": {0: 0.5}}))
    assert not report()
    run.redis.delete(run.key("metrics"))
    with pytest.raises(Behind):
        report()
    run.do(run.opening.gather(run.shards, run.number("generation")))
    run.reopen(RunState(2, seq=1, initialized=True))
    assert report()


def test_a_run_that_an_older_version_opened_has_no_mark(run: DrivenRun) -> None:
    run.redis.hdel(run.key("run"), "marked")
    run.redis.delete(run.key("receipts"))
    assert run.push(run.claim(run.grant(), "key")).decision == "applied"


def test_receipts_that_are_all_evicted_are_not_lost(run: DrivenRun) -> None:
    lease = run.grant()
    run.push(run.claim(lease, "key"))
    run.redis.hdel(run.key("receipts"), "key")
    assert run.push(run.claim(lease, "other", 1)).seq == 2


def test_a_group_that_is_lost_is_noticed(make_run: Make) -> None:
    run = make_run(policy=Policy("3", "none", distinct=False)).open()
    lease = run.grant()
    run.push(run.claim(lease, "one"))
    run.redis.delete(run.key("group"))
    with pytest.raises(Behind):
        run.admit(run.claim(lease, "two"))


@pytest.mark.parametrize("lost", ["pending", "staged"])
@pytest.mark.parametrize("is_written_to", [False, True])
def test_a_push_on_its_way_does_not_keep_its_slot_for_ever(make_run: Make, lost: str, is_written_to: bool) -> None:
    run = make_run(3).open()
    lease, other = run.grant("w"), run.grant("other")
    claim = run.claim(lease, "key")
    for shard in range(run.shards):
        run.admit(claim, shard)
    run.redis.delete(run.key(lost))
    if is_written_to:
        # As by a script between its loss and the next look.
        kept = {"pending": "another claim", "staged": '{"at":0,"queued":false,"parts":{}}'}
        run.redis.hset(run.key(lost), "another", kept[lost])
    for call in (run.admit, run.commit):
        with pytest.raises(Behind):
            call(claim)
    run.do(run.opening.gather(run.shards, run.number("generation")))
    run.reopen(RunState(1, initialized=True))
    assert run.number("in_flight") == 0
    assert run.push(claim).seq == 1
    assert run.push(run.claim(other, "next", 1)).seq == 2


def test_a_queue_that_is_lost_is_made_anew(make_run: Make) -> None:
    run = make_run(3).open()
    leases = [run.grant(f"w-{number}") for number in range(3)]
    claims = [run.claim(lease, f"{lease.worker}-{number}") for lease in leases for number in range(2)]
    admitted = [run.admit(claim) for claim in claims]
    assert [each.queued for each in admitted] == [False] * 4 + [True] * 2
    run.redis.delete(run.key("queue"))
    run.expire()
    assert set(run.redis.lrange(run.key("queue"), 0, -1)) == {"w-2-0", "w-2-1"}
    for claim in claims[:4]:
        run.discard(claim)
    assert run.redis.lrange(run.key("queue"), 0, -1) == []
    assert run.number("in_flight") == 2


def test_a_loss_of_owners_and_leases_closes_the_run_and_ends_leases(run: DrivenRun) -> None:
    lease = run.grant("w", 1000)
    run.redis.delete(run.key("workers"))
    with pytest.raises(Exception, match="lease"):
        run.admit(run.claim(lease, "key"))
    run.pass_time(2000)
    run.expire()
    assert run.redis.zcard(run.key("leases")) == 0
    fresh = run.grant("w")
    assert run.push(run.claim(fresh, "key")).seq == 1
    run.redis.delete(run.key("shards"))
    run.take_all()
    assert run.field("phase") == "gather"


def claimed_units(run: DrivenRun, lease: Lease) -> list[int]:
    return run.do(run.coordinator.data.claim(run.owner(), lease.lease, lease.token, "train", 3, "")).numbers


@pytest.mark.parametrize("comes_again", [False, True])
@pytest.mark.parametrize("lost", ["leases", "workers"])
def test_units_of_leases_that_are_lost_are_handed_out_again(run: DrivenRun, lost: str, comes_again: bool) -> None:
    """Nothing tells any more whose they are, or until when; and a pass waits for all of them."""
    data = run.coordinator.data
    run.do(data.create(run.owner(), NewDataSet("train", DataSpec(length=6, unit=1))))
    lost_leases = [run.grant(worker, 1000) for worker in ("dead", "other")]
    assert [claimed_units(run, lease) for lease in lost_leases] == [[0, 1, 2], [3, 4, 5]]
    run.redis.delete(run.key(lost))
    if comes_again:
        run.grant("dead")
    if lost == "workers":
        run.pass_time(2000)
    run.expire()
    (view,) = run.do(data.read_all())
    assert (list(view.out), view.back) == ([], [0, 1, 2, 3, 4, 5])
    fresh = run.grant("fresh")
    assert claimed_units(run, fresh) + claimed_units(run, fresh) == [0, 1, 2, 3, 4, 5]


def test_a_lease_whose_end_is_lost_ends(make_run: Make) -> None:
    """Its worker may never come again, for which its name and its receipts would be kept."""
    run = make_run(policy=Policy("live", "none", distinct=False)).open()
    run.grant("dead")
    run.redis.delete(run.key("leases"))
    ended = run.expire().ended
    assert ended is not None and ended.workers == ["dead"]
    assert not run.redis.exists(run.key("workers"))
    assert run.expire().ended is None


def test_a_push_that_travels_is_still_said_to_be_pending(make_run: Make) -> None:
    run = make_run().open()
    claim = run.claim(run.grant(), "key")
    run.admit(claim)
    with pytest.raises(Pending):
        run.admit(claim)
