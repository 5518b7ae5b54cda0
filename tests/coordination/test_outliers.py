"""What the commit says of a push's norm under a robust rule, against a slow twin; and the workers that it bans."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordination.driven import DrivenRun, Driver, norms_of
from freestep.errors import LeaseExpired, WorkerBanned
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.norm_history import KEPT_NORMS, NormHistory
from freestep_service.domain.records import Record, RunState, StagedPart

Make = Callable[..., DrivenRun]
STEADY = settings(derandomize=True, deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))

CLIP = Policy("1", "none", False, "", '{"clip": 2.0, "outlier": 10.0}')
BANS = CLIP._replace(bounds='{"clip": 2.0, "outlier": 10.0, "ban_after": 2}')
MEDIAN = Policy("3", "none", True, "", '{"outlier": 10.0}', 3)
WORKERS = ("a", "b", "c", "d")

Pushed = tuple[str, float]
pushes = st.lists(
    st.tuples(st.sampled_from(WORKERS), st.sampled_from([0.0, 1.0, 1.1, 1.5, 3.0, 30.0, 1000.0])),
    min_size=1,
    max_size=40,
)


def usual_norm(history: Sequence[Pushed], worker: str, live: int) -> float | None:
    """What a push of a worker is compared with, as the spec's documentation says it."""
    known = {name for name, _ in history}
    if len(known) < min(live, 3) and len(history) < 16:
        return None

    def norms_of(name: str) -> list[float]:
        return [norm for each, norm in history if each == name and norm > 0][-5:]

    medians = [statistics.median_low(norms_of(name)) for name in known if norms_of(name)]
    if not medians:
        return None
    usual = statistics.median_low(medians)
    own = norms_of(worker)
    return min(usual, statistics.median_low(own)) if len(own) == 5 else usual


class Pusher:
    """Workers who push to a run, each at its newest step."""

    def __init__(self, run: DrivenRun, workers: Sequence[str] = WORKERS) -> None:
        self.run = run.open()
        self.leases = {worker: run.grant(worker) for worker in workers}
        self.keys = 0

    def push(self, worker: str, norm: float) -> Record:
        """A push whose parts have equal norms."""
        run, self.keys = self.run, self.keys + 1
        claim = run.claim(self.leases[worker], f"key-{self.keys}", run.number("step"))
        share = norm / run.shards**0.5
        for shard in range(run.shards):
            run.admit(claim, shard)
        for shard in range(run.shards):
            part = StagedPart(10 * shard, 10 * shard + 10, "digest", share, 40)
            answer = run.commit_part(claim, shard, part)
        assert answer is not None
        return answer[0]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_push_is_judged_by_the_norms_in_the_log(driver: Driver, shards: int) -> None:
    @STEADY
    @given(pushed=pushes)
    def judged(pushed: list[Pushed]) -> None:
        pusher, history = Pusher(DrivenRun(driver, shards, CLIP)), []
        for worker, norm in pushed:
            usual, record = usual_norm(history, worker, len(WORKERS)), pusher.push(worker, norm)
            history.append((worker, float(record.norm)))
            assert float(record.norm) == pytest.approx(norm)
            assert record.seq == len(history)
            if usual is None:
                assert (record.decision, record.reason, record.bound) == ("dropped", "norms-unknown", None)
                continue
            is_outlier = float(record.norm) > 10 * usual
            assert (record.decision, record.reason) == ("applied", "outlier" if is_outlier else None)
            assert float(record.bound or 0) == 2 * usual
        assert pusher.run.remembered_norms() == norms_of(pusher.run.entries())
        assert [entry["advance"] for entry in pusher.run.entries()].count(True) == pusher.run.number("step")

    judged()


def test_a_rule_that_compares_names_outliers_and_drops_none(make_run: Make) -> None:
    pusher = Pusher(make_run(policy=MEDIAN))
    records = [pusher.push(worker, 1000.0 if worker == "c" else 1.0) for worker in ("a", "b", "c") * 2]
    assert [record.decision for record in records] == ["accumulated", "accumulated", "applied"] * 2
    assert [record.reason for record in records] == [None] * 5 + ["outlier"]
    assert {record.bound for record in records} == {None}
    assert pusher.push("a", 1.0).decision == "accumulated"
    again = pusher.push("a", 1.0)
    assert (again.decision, again.reason, again.seq) == ("dropped", "duplicate-worker", 0)
    assert len(pusher.run.remembered_norms().norms) == 7


def test_no_norms_are_kept_without_a_robust_rule(make_run: Make) -> None:
    pusher = Pusher(make_run())
    assert pusher.push("a", 1000.0).reason is None
    assert pusher.run.remembered_norms() == NormHistory()


def test_the_oldest_norms_are_forgotten(make_run: Make) -> None:
    pusher = Pusher(make_run(policy=CLIP), ["a"])
    for number in range(KEPT_NORMS + 5):
        pusher.push("a", 1.0 + number / 1000)
    assert pusher.run.remembered_norms() == norms_of(pusher.run.entries())
    assert len(pusher.run.remembered_norms().norms) == KEPT_NORMS


def test_a_worker_of_too_many_outliers_is_banned(make_run: Make) -> None:
    run = make_run(policy=BANS)
    pusher = Pusher(run)
    for worker in WORKERS:
        pusher.push(worker, 1.0)
    assert pusher.push("d", 50.0).reason == "outlier"
    assert run.do(run.leases.workers())[-1].outliers == 1
    assert pusher.push("d", 50.0).reason == "outlier"
    before = run.dump()
    with pytest.raises(LeaseExpired):
        run.admit(run.claim(pusher.leases["d"], "next"))
    with pytest.raises(WorkerBanned) as refused:
        run.grant("d")
    assert refused.value.extensions == {"outliers": 2}
    assert run.dump() == before
    assert [worker.worker for worker in run.do(run.leases.workers())] == ["a", "b", "c"]
    run.grant("a")


def test_outliers_of_long_ago_ban_nobody(make_run: Make) -> None:
    run = make_run(policy=BANS)
    pusher = Pusher(run)
    for worker in (*WORKERS, "a", "b", "c"):
        pusher.push(worker, 1.0)
    for distance in (KEPT_NORMS, KEPT_NORMS - 1):
        assert pusher.push("d", 50.0).reason == "outlier"
        for number in range(distance - 1):
            assert pusher.push("abc"[number % 3], 1.0).reason is None
    assert run.remembered_norms().outliers == {"d": 2}
    assert run.remembered_norms().banned == {}
    assert pusher.push("d", 50.0).reason == "outlier"
    assert run.remembered_norms() == norms_of(run.entries(), 2)
    assert run.remembered_norms().banned == {"d": 1}


def test_when_all_norms_jump_the_usual_one_follows(make_run: Make) -> None:
    pusher = Pusher(make_run(policy=CLIP))
    for norm, pushes in ((1.0, 10), (50.0, 10)):
        reasons = [pusher.push(worker, norm).reason for _ in range(pushes) for worker in WORKERS]
    assert [reasons[first::4].count("outlier") for first in range(4)] == [3, 3, 3, 3]
    assert set(reasons[12:]) == {None}


def test_a_push_that_bans_is_found_when_it_is_sent_again(make_run: Make) -> None:
    pusher = Pusher(make_run(policy=BANS))
    for worker in WORKERS:
        pusher.push(worker, 1.0)
    pusher.push("d", 50.0)
    record = pusher.push("d", 50.0)
    admission = pusher.run.admit(
        pusher.run.claim(pusher.leases["d"], f"key-{pusher.keys}", pusher.run.number("step") - 1)
    )
    assert (admission.replayed, admission.record) == (True, record)


def test_an_update_does_not_wait_for_a_banned_worker(make_run: Make) -> None:
    policy = Policy("live", "0", True, "", '{"outlier": 10.0, "ban_after": 1, "max_batch": 4}', 4)
    pusher = Pusher(make_run(policy=policy), ["a", "b", "c"])
    assert [pusher.push(worker, 1.0).decision for worker in "abc"] == ["accumulated", "accumulated", "applied"]
    assert pusher.push("c", 50.0).reason == "outlier"
    assert [pusher.push(worker, 1.0).decision for worker in "ab"] == ["accumulated", "applied"]
    assert [pusher.push(worker, 1.0).decision for worker in "ab"] == ["accumulated", "applied"]


def test_sync_updates_have_no_more_pushes_than_are_kept(make_run: Make) -> None:
    policy = Policy("live", "0", True, "", '{"outlier": 10.0, "max_batch": 3}', 3)
    pusher = Pusher(make_run(policy=policy))
    assert [pusher.push(worker, 1.0).decision for worker in "abc"] == ["accumulated", "accumulated", "applied"]
    assert pusher.run.number("step") == 1


def test_a_redis_that_lost_its_data_gets_norms_and_bans_back(make_run: Make) -> None:
    run = make_run(policy=BANS)
    pusher = Pusher(run)
    for worker in (*WORKERS, "d", "d"):
        pusher.push(worker, 50.0 if run.number("step") else 1.0)
    history, step, seq = pusher.run.remembered_norms(), run.number("step"), run.number("seq")
    assert history.outliers == {"d": 2}
    run.redis.delete(*run.redis.scan_iter(run.key("*")))
    run.do(run.opening.gather(1))
    run.take_all()
    run.reopen(RunState(1, step, seq, True, norm_history=history))
    assert pusher.run.remembered_norms() == history
    with pytest.raises(WorkerBanned):
        run.grant("d")
    pusher.leases = {"a": run.grant("a")}
    assert pusher.push("a", 3.0).bound == "2"
