"""Runs are changed, and leases of workers are ended by operators, by scripts."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from coordination.driven import ASYNC, DrivenRun
from freestep.errors import LeaseExpired, MalformedRequest, RunNotInitialized, RunPaused, WorkerSuspended
from freestep_service.coordination.leases import EndedWorker
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control, ControlChange, Orders
from freestep_service.domain.records import Behind, Fenced, LogPosition

Make = Callable[..., DrivenRun]
SYNC = Policy("live", "0", distinct=True)
PAUSED = Control(orders=Orders(paused=True))


def end(run: DrivenRun, worker: str = "w", lease: str = "", ban_s: int | None = None) -> EndedWorker:
    return run.do(run.leases.end_worker(run.owner(), worker, lease, ban_s, "{}", "me"))


def change(run: DrivenRun, before: Control, after: Control, policy: Policy = ASYNC) -> bool:
    """Whether it was made."""
    entry = run.do(run.log.change_run(run.owner(), before, after, policy, "{}", "me"))
    if entry is not None:
        run.position = LogPosition(1, entry["seq"])
    return entry is not None


def kept(run: DrivenRun) -> Control:
    """What Redis has of what was changed."""
    return Control.of(run.view().run)


def told(run: DrivenRun) -> Control:
    """What shards have of it, by the log."""
    control = Control()
    for entry in run.entries():
        if "control" in entry:
            control = ControlChange.of(entry["control"]).after(control)
    return control


# Changes


def test_a_change_is_in_the_log_and_in_the_run(run: DrivenRun) -> None:
    after = Control({"lr": 0.5}, answered={"key": "digest"}, orders=Orders(paused=True))
    assert change(run, Control(), after, Policy("4", "9", distinct=True, slack="2"))
    assert kept(run) == told(run) == after
    view = run.view()
    assert [view.run[name] for name in ("batch", "max_staleness", "distinct", "slack")] == ["4", "9", "1", "2"]
    assert (run.entries()[0]["seq"], view.number("seq")) == (1, 1)


@pytest.mark.parametrize("before", [Control({"lr": 0.25}), PAUSED])
def test_a_change_of_what_was_changed_meanwhile_is_not_made(run: DrivenRun, before: Control) -> None:
    unchanged = run.dump()
    assert not change(run, before, Control({"lr": 0.5}))
    assert run.dump() == unchanged


def test_what_cannot_be_changed_changes_nothing(make_run: Make) -> None:
    run = make_run().open(initialized=False)
    before = run.dump()
    with pytest.raises(RunNotInitialized):
        change(run, Control(), PAUSED)
    for owner, refusal in (
        (run.owner()._replace(token="another"), Fenced),
        (run.owner()._replace(position=LogPosition(1, 1)), Behind),
    ):
        with pytest.raises(refusal):
            run.do(run.log.change_run(owner, Control(), PAUSED, ASYNC, "{}", "me"))
        with pytest.raises(refusal):
            run.do(run.leases.end_worker(owner, "w", "", 60, "{}", "me"))
    assert run.dump() == before


def test_a_paused_run_refuses_pushes_until_it_is_resumed(run: DrivenRun) -> None:
    lease = run.grant()
    assert change(run, Control(), PAUSED)
    with pytest.raises(RunPaused):
        run.push(run.claim(lease, "key"))
    assert change(run, PAUSED, Control())
    assert run.push(run.claim(lease, "key")).decision == "applied"


def test_an_update_that_a_new_policy_finds_complete_is_made_with_the_change(make_run: Make) -> None:
    run = make_run(1, policy=Policy("3", "none", distinct=False)).open()
    assert run.push(run.claim(run.grant(), "key")).decision == "accumulated"
    run.position = LogPosition(1, 1)
    assert change(run, Control(), Control(aggregation={"batch": 1}), ASYNC)
    assert (run.entries()[-1]["advance"], run.view().number("step"), run.number("grouped")) == (True, 1, 0)


# Workers that operators end


def test_a_lease_is_ended_and_another_may_be_had(run: DrivenRun) -> None:
    lease = run.grant()
    assert end(run, lease=lease.lease) == EndedWorker(had_lease=True)
    with pytest.raises(LeaseExpired):
        run.do(run.leases.renew(lease.lease))
    assert run.entries() == []
    assert end(run) == EndedWorker()
    assert run.grant().token > lease.token


def test_a_worker_that_has_a_newer_lease_keeps_it(run: DrivenRun) -> None:
    older, newer = run.grant(), run.grant()
    before = run.dump()
    assert end(run, lease=older.lease, ban_s=60) == EndedWorker(newer_lease=newer.lease)
    assert end(run, ban_s=60) == EndedWorker(newer_lease=newer.lease)
    assert run.dump() == before


def test_who_is_refused_is_the_same_in_redis_and_by_the_log(run: DrivenRun) -> None:
    for worker, ban_s in (("a", 3600), ("b", 7200), ("a", 0), ("c", 60)):
        found = end(run, worker, ban_s=ban_s)
        assert found.entry is not None
        run.position = LogPosition(1, found.entry["seq"])
    assert kept(run) == told(run)
    assert set(kept(run).orders.suspended) == {"b", "c"}
    with pytest.raises(WorkerSuspended) as refused:
        run.grant("b")
    assert 7100 < (refused.value.retry_after or 0) <= 7200
    run.grant("a")


def test_nobody_is_kept_whose_time_is_over(run: DrivenRun) -> None:
    run.redis.hset(run.key("run"), "suspended", json.dumps({"over": 1}))
    end(run, "w", ban_s=60)
    assert set(kept(run).orders.suspended) == {"w"}


def test_a_run_refuses_only_so_many_workers(run: DrivenRun) -> None:
    later = 2**42
    run.redis.hset(run.key("run"), "suspended", json.dumps({f"w-{number}": later for number in range(1024)}))
    before = run.dump()
    with pytest.raises(MalformedRequest, match="1024 workers already"):
        end(run, "one more", ban_s=60)
    assert run.dump() == before
    # One of them is refused for longer, or no more; and a lease is ended for all that.
    end(run, "w-0", ban_s=60)
    end(run, "w-1", ban_s=0)
    end(run, "one more", ban_s=60)
    assert len(kept(run).orders.suspended) == 1024


def test_an_update_that_waits_for_a_worker_alone_is_made_when_its_lease_is_ended(make_run: Make) -> None:
    run = make_run(2, policy=SYNC).open()
    first, second = run.grant("first"), run.grant("second")
    assert run.push(run.claim(first, "key")).decision == "accumulated"
    run.position = LogPosition(1, 1)
    found = end(run, "second", second.lease)
    assert found.entry is not None
    assert (found.entry["advance"], found.entry["closed_by"], run.view().number("step")) == (True, "second", 1)


def test_the_receipts_of_an_ended_lease_stay(run: DrivenRun) -> None:
    lease = run.grant()
    record = run.push(run.claim(lease, "key"))
    run.position = LogPosition(1, record.seq)
    end(run, lease=lease.lease)
    assert run.receipts() == {"key": record}
