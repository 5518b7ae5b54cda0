"""Runs are created, opened, divided anew and deleted by scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from coordination.driven import ASYNC, DrivenRun
from freestep.errors import RunNotFound
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.run_scripts import RUNS_KEY
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import CheckpointId, Origin, Record, RunState
from freestep_service.domain.run_view import DamagedRun

Make = Callable[..., DrivenRun]

RECORD = Record("lease 1 0 None", {"0-10": "d"}, "applied", step=1, staleness=0, seq=3, live=1, worker="w", epoch=1)


# Creation


def test_a_run_is_created_once(make_run: Make) -> None:
    run = make_run(2)
    assert run.do(run.opening.read()) is None
    assert run.do(run.opening.create(4, 2)) == "created"
    assert run.do(run.opening.create(5, 3)) == "same"
    other = Coordinator(run.driver.store, run.name, '{"other": 1}', Policy("1", "none", False))
    assert run.do(other.opening.create(4, 2)) == "different"
    view = run.view()
    assert (view.phase, view.count, view.missing()) == ("gather", 2, [0, 1])
    assert (view.number("epoch"), view.number("step"), view.number("seq"), view.number("initialized")) == (4, 0, 0, 0)
    assert run.redis.sismember(RUNS_KEY, run.name)


def test_a_deleted_run_leaves_its_last_epoch_alone(run: DrivenRun) -> None:
    run.push(run.claim(run.grant(), "key"))
    assert run.dump()
    assert run.do(run.opening.delete(1)) == 1
    assert run.dump() == {run.key("deleted"): "1"}
    assert run.do(run.opening.read()) is None


def test_a_run_with_very_many_workers_is_deleted(make_run: Make) -> None:
    run = make_run().open()
    leases = [f"lease-{number}" for number in range(5000)]
    run.redis.hset(run.key("workers"), mapping={f"worker-{number}": lease for number, lease in enumerate(leases)})
    run.redis.hset(run.key(f"lease:{leases[-1]}"), "worker", "worker-4999")
    run.do(run.opening.delete(1))
    assert run.dump() == {run.key("deleted"): "1"}


def test_a_deleted_run_is_not_begun_anew_by_who_has_missed_that(make_run: Make) -> None:
    """It takes the run for one that Redis has lost."""
    run = make_run().open(epoch=3)
    # Somebody has gone on in a later epoch than the caller knows of.
    assert run.do(run.opening.delete(2)) == 3
    run.redis.srem(RUNS_KEY, run.name)
    with pytest.raises(RunNotFound):
        run.do(run.opening.gather(run.shards))
    assert run.dump() == {run.key("deleted"): "3"}
    assert not run.redis.sismember(RUNS_KEY, run.name)


def test_a_new_run_of_the_name_is_begun_anew_where_redis_has_lost_it(make_run: Make) -> None:
    run = make_run().open()
    run.do(run.opening.delete(1))
    next_run = Coordinator(run.driver.store, run.name, "{}", ASYNC, Origin(2, "another"))
    assert run.do(next_run.opening.create(2, 1)) == "created"
    run.redis.delete(run.key("run"))
    with pytest.raises(RunNotFound):
        run.do(run.opening.gather(run.shards))
    run.do(next_run.opening.gather(1))
    assert run.field("id") == "another"
    # Whoever deletes it again, and knows of the first run only, does not go back behind that.
    run.redis.delete(run.key("run"))
    assert run.do(run.opening.delete(1)) == 1
    run.redis.set(run.key("deleted"), "7")
    assert run.do(run.opening.delete(1)) == 7


# The phases of an opening


def test_the_phases_of_an_opening_have_generations_of_their_own(make_run: Make) -> None:
    run = make_run(2)
    run.do(run.opening.create(1, 2))
    created = run.view().generation
    run.take_all()
    gathering = run.view()
    assert (gathering.phase, gathering.generation > created) == ("gather", True)
    assert run.do(run.opening.report_shard(run.owner(0), gathering.generation, "a")) is None
    assert run.do(run.opening.report_shard(run.owner(0), gathering.generation, "b")) is None
    assert run.do(run.opening.report_shard(run.owner(1), gathering.generation, "c")) == ["b", "c"]
    assert run.do(run.opening.open(RunState(1), 2, gathering.generation, {"cut": None, "live": False}))
    loading = run.view()
    assert (loading.phase, loading.target()) == ("load", {"cut": None, "live": False})
    assert loading.generation > gathering.generation
    # Calls of the generation that is over change nothing.
    before = run.dump()
    assert run.do(run.opening.report_shard(run.owner(0), gathering.generation, "late")) is None
    assert run.do(run.opening.loaded(run.owner(0), gathering.generation)) == "late"
    assert not run.do(run.opening.open(RunState(9), 2, gathering.generation, {}))
    assert run.do(run.opening.gather(2, gathering.generation)) == loading.generation
    run.do(run.opening.reshard(gathering.generation, 5))
    assert run.dump() == before
    assert run.do(run.opening.loaded(run.owner(1), loading.generation)) == "waiting"
    assert run.do(run.opening.loaded(run.owner(1), loading.generation)) == "waiting"
    assert run.do(run.opening.loaded(run.owner(0), loading.generation)) == "open"
    assert run.do(run.opening.loaded(run.owner(1), loading.generation)) == "open"
    assert (run.view().phase, run.view().generation) == ("open", loading.generation)


def test_a_run_is_not_gathered_while_a_shard_has_no_owner(make_run: Make) -> None:
    run = make_run(2)
    run.do(run.opening.create(1, 2))
    run.heartbeat(None, 0)
    generation = run.view().generation
    assert run.do(run.opening.report_shard(run.owner(0), generation, "a")) is None
    run.heartbeat(None, 1)
    # That shard's new owner may have been reported for by the old one.
    assert run.view().generation > generation


def test_a_run_that_redis_lost_is_gathered_anew(run: DrivenRun) -> None:
    run.redis.delete(run.key("run"))
    assert run.heartbeat() is None
    generation = run.do(run.opening.gather(run.shards))
    view = run.view()
    assert (view.phase, view.generation, view.number("epoch")) == ("gather", generation, 0)
    assert "lost" in view.run
    run.reopen(RunState(7, step=5, seq=6, initialized=True))
    view = run.view()
    assert "lost" not in view.run
    assert [view.number(name) for name in ("epoch", "step", "seq", "initialized")] == [7, 5, 6, 1]


def test_a_state_is_written_with_its_receipts_group_and_metrics(run: DrivenRun) -> None:
    live, gone = run.grant("live"), "0" * 32
    records = {
        "of-live": replace(RECORD, claim=f"{live.lease} {live.token} 0 None"),
        "of-gone": replace(RECORD, claim=f"{gone} 1 0 None"),
    }
    state = RunState(
        2,
        step=4,
        seq=9,
        initialized=True,
        group={"w": 2, "v": 1},
        receipts=records,
        reported={"loss": {3: 0.5, 4: 0.1}},
    )
    run.push(run.claim(live, "before"))
    run.do(run.opening.gather(run.shards))
    run.reopen(state)
    assert run.redis.hgetall(run.key("group")) == {"w": "2", "v": "1"}
    assert run.number("grouped") == 3
    assert run.receipts() == records
    assert run.redis.lrange(run.key(f"window:{live.lease}"), 0, -1) == ["of-live"]
    assert run.redis.lrange(run.key("ended"), 0, -1) == ["of-gone"]
    assert (run.entries(), run.redis.hlen(run.key("pending"))) == ([], 0)
    metrics = run.do(run.log.metrics())
    assert (metrics["loss"].value, metrics["loss"].step) == (0.1, 4)


def test_a_checkpoint_is_noted_as_durable_where_redis_knows_of_none(run: DrivenRun) -> None:
    def noted() -> tuple[str | None, str | None]:
        return run.field("durable"), run.field("durable_step")

    def opened(durable: CheckpointId | None) -> None:
        generation = run.do(run.opening.gather(run.shards))
        assert run.do(run.opening.open(RunState(1, initialized=True), run.shards, generation, {}, None, durable))

    opened(None)
    assert noted() == (None, None)
    opened(CheckpointId(1, 5, 6))
    assert noted() == ("1-5-6", "5")
    opened(CheckpointId(1, 3, 3))
    assert noted() == ("1-5-6", "5")


def test_a_run_is_divided_into_another_number_of_shards(make_run: Make) -> None:
    run = make_run(2).open()
    assert run.do(run.opening.gather(2, resharding=3)) == run.number("generation")
    assert run.view().number("resharding") == 3
    run.do(run.opening.reshard(run.number("generation"), 3))
    view = run.view()
    assert (view.count, view.missing(), view.phase, view.run["recut"]) == (3, [0, 1, 2], "gather", "1")
    assert "resharding" not in view.run


# Damage


@pytest.mark.parametrize("field", ["phase", "generation", "batch", "epoch", "seq"])
def test_a_damaged_run_is_named(run: DrivenRun, field: str) -> None:
    run.redis.hdel(run.key("run"), field)
    with pytest.raises(DamagedRun, match=f"{field} is missing"):
        run.view()


def test_a_hash_without_a_spec_is_no_run(run: DrivenRun) -> None:
    run.redis.delete(run.key("run"))
    run.redis.hset(run.key("run"), mapping={"durable": "1-2-3", "durable_step": 2})
    assert run.do(run.opening.read()) is None
    assert run.heartbeat() is None
    run.do(run.opening.gather(run.shards))
    assert "durable" not in run.view().run
    run.redis.hdel(run.key("run"), "spec")
    assert run.do(run.opening.create(8, run.shards)) == "created"
    assert run.view().number("epoch") == 8
