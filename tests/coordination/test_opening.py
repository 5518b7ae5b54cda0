"""Runs are created, owned, opened, divided anew and deleted by scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from coordination.driven import HOUR, DrivenRun
from freestep.errors import ShardUnavailable
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.run_scripts import RUNS_KEY
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import Behind, Fenced, LogPosition, Record, RunState
from freestep_service.domain.run_view import DamagedRun

Make = Callable[..., DrivenRun]

HERE, THERE = "here boot-1", "there boot-2"
RECORD = Record("lease 1 0 None", {"0-10": "d"}, "applied", step=1, staleness=0, seq=3, live=1, worker="w", epoch=1)


def node(url: str = "http://other:1", host: str = HERE) -> Node:
    return Node(url, HOUR, host=host)


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


def test_a_deleted_run_leaves_no_key(run: DrivenRun) -> None:
    run.push(run.claim(run.grant(), "key"))
    assert run.dump()
    run.do(run.opening.delete())
    assert run.dump() == {}
    assert not run.redis.sismember(RUNS_KEY, run.name)


# Ownership


def test_there_is_no_heartbeat_for_an_unknown_run(make_run: Make) -> None:
    run = make_run()
    assert run.heartbeat(None, 0) is None
    assert run.dump() == {}


def test_a_shard_has_one_owner(make_run: Make) -> None:
    run, other = make_run(2), node()
    run.do(run.opening.create(1, 2))
    mine = run.heartbeat(None, 0)
    assert mine is not None
    assert (mine.field(0, "node"), mine.missing()) == (run.node.id, [1])
    theirs = run.heartbeat(other, 0, 1)
    assert theirs is not None
    assert [theirs.field(shard, "node") for shard in (0, 1)] == [run.node.id, other.id]
    assert int(theirs.field(1, "token") or 0) > int(theirs.field(0, "token") or 0)
    assert theirs.missing() == []


def test_an_owner_that_is_silent_loses_its_shard_to_one_that_wants_it(make_run: Make) -> None:
    run, other = make_run().open(), node()
    before, generation = run.owner(), run.number("generation")
    run.pass_time(HOUR)
    seen = run.heartbeat(other)
    assert seen is not None
    assert (seen.missing(), seen.phase, seen.field(0, "node")) == ([0], "gather", run.node.id)
    taken = run.heartbeat(other, 0)
    assert taken is not None
    assert taken.field(0, "node") == other.id
    assert int(run.owner().token) > int(before.token)
    assert taken.generation > generation
    # What the old owner calls counts for nothing.
    with pytest.raises(Fenced):
        run.do(run.opening.report_shard(before, taken.generation, "{}"))
    with pytest.raises(Fenced):
        run.do(run.opening.loaded(before, taken.generation))
    run.do(run.opening.give_up([before]))
    assert run.shard_field(0, "node") == other.id


def test_an_owner_that_was_silent_keeps_a_shard_that_nobody_took(run: DrivenRun) -> None:
    token = run.owner().token
    run.pass_time(HOUR)
    seen = run.heartbeat()
    assert seen is not None
    assert (seen.missing(), run.owner().token) == ([], token)


@pytest.mark.parametrize(
    ("url", "host", "takes"),
    [("http://same:1", HERE, True), ("http://same:1", THERE, False), ("http://other:1", HERE, False)],
)
def test_a_process_takes_over_at_once_from_its_predecessor(make_run: Make, url: str, host: str, takes: bool) -> None:
    run = make_run()
    run.do(run.opening.create(1, 1))
    first, second = node("http://same:1"), node(url, host)
    before = run.heartbeat(first, 0)
    after = run.heartbeat(second, 0)
    assert before is not None and after is not None
    assert after.field(0, "node") == (second.id if takes else first.id)
    assert before.was_owned_by_predecessor(0, url, host) == takes


def test_a_process_takes_over_from_a_predecessor_that_wrote_no_host(make_run: Make) -> None:
    run = make_run()
    run.do(run.opening.create(1, 1))
    run.heartbeat(node("http://same:1"), 0)
    run.redis.hdel(run.key("shards"), "0:host")
    second = node("http://same:1", THERE)
    after = run.heartbeat(second, 0)
    assert after is not None
    assert (after.field(0, "node"), after.field(0, "host")) == (second.id, THERE)


def test_fields_are_kept_of_owned_shards_only(make_run: Make) -> None:
    run, other = make_run(2), node()
    run.do(run.opening.create(1, 2))
    run.heartbeat(other, 1)
    view = run.heartbeat(None, 0, **{"0:applied": "7", "1:applied": "8"})
    assert view is not None
    assert (view.field(0, "applied"), view.field(1, "applied")) == ("7", None)


def test_what_shards_have_applied_is_kept_of_the_present_epoch(make_run: Make) -> None:
    run, other = make_run(2).open(epoch=3), node()
    run.do(run.opening.heartbeat(run.node, (), {}, {0: LogPosition(3, 5), 1: LogPosition(2, 9)}))
    assert (run.shard_field(0, "applied_seq"), run.shard_field(1, "applied_seq")) == ("5", None)
    run.do(run.opening.heartbeat(other, (), {}, {0: LogPosition(3, 8)}))
    assert run.shard_field(0, "applied_seq") == "5"
    run.do(run.opening.gather(2))
    run.reopen(RunState(4, seq=2, initialized=True))
    assert run.shard_field(0, "applied_seq") is None


def test_a_shard_that_is_given_up_is_free_at_once(run: DrivenRun) -> None:
    owners = [run.owner(shard) for shard in range(run.shards)]
    generation = run.number("generation")
    run.do(run.opening.give_up([]))
    assert run.number("generation") == generation
    run.do(run.opening.give_up(owners))
    view = run.view()
    assert (view.phase, view.missing()) == ("gather", list(range(run.shards)))
    assert run.redis.hgetall(run.key("shards")) == {}
    run.do(run.opening.give_up(owners))
    assert run.view().generation == view.generation


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
    assert {key: Record.from_json(text) for key, text in run.redis.hgetall(run.key("receipts")).items()} == records
    assert run.redis.lrange(run.key(f"window:{live.lease}"), 0, -1) == ["of-live"]
    assert run.redis.lrange(run.key("ended"), 0, -1) == ["of-gone"]
    assert (run.entries(), run.redis.hlen(run.key("pending"))) == ([], 0)
    metrics = run.do(run.log.metrics())
    assert (metrics["loss"].value, metrics["loss"].step) == (0.1, 4)


def test_a_run_is_divided_into_another_number_of_shards(make_run: Make) -> None:
    run = make_run(2).open()
    assert run.do(run.opening.gather(2, resharding=3)) == run.number("generation")
    assert run.view().number("resharding") == 3
    run.do(run.opening.reshard(run.number("generation"), 3))
    view = run.view()
    assert (view.count, view.missing(), view.phase, view.run["recut"]) == (3, [0, 1, 2], "gather", "1")
    assert "resharding" not in view.run


# Initial weights


def weights(run: DrivenRun, shard: int, upload: str, progress: str, patience_ms: int = HOUR) -> str:
    return run.do(run.opening.initial_weights(run.owner(shard), upload, progress, patience_ms))


def test_the_first_upload_of_a_single_shard_wins(make_run: Make) -> None:
    run = make_run().open(initialized=False)
    assert weights(run, 0, "a", "coming") == "coming"
    assert weights(run, 0, "b", "coming") == "coming"
    assert weights(run, 0, "a", "withdrawn") == "waiting"
    assert run.view().number("initialized") == 0
    assert weights(run, 0, "b", "staged") == "initialized"
    assert weights(run, 0, "b", "staged") == "initialized"
    assert weights(run, 0, "a", "staged") == "already-initialized"
    assert run.view().number("initialized") == 1


def test_uploads_to_several_shards_take_turns(make_run: Make) -> None:
    run = make_run(2).open(initialized=False)
    assert weights(run, 0, "a", "coming") == "coming"
    assert weights(run, 1, "b", "coming") == "waiting"
    assert weights(run, 1, "b", "staged") == "waiting"
    assert weights(run, 0, "a", "staged") == "staged"
    # A turn ends when a part is withdrawn, or when nothing comes for long while others wait.
    assert weights(run, 1, "a", "withdrawn") == "waiting"
    assert weights(run, 1, "b", "coming") == "coming"
    assert weights(run, 0, "a", "coming") == "waiting"
    assert weights(run, 0, "a", "coming", patience_ms=0) == "coming"
    assert weights(run, 0, "a", "staged") == "staged"
    assert run.view().number("initialized") == 0
    assert weights(run, 1, "a", "staged") == "initialized"
    assert weights(run, 0, "a", "staged") == "initialized"
    assert weights(run, 1, "b", "coming") == "already-initialized"


def test_a_part_that_was_staged_by_a_former_owner_does_not_count(make_run: Make) -> None:
    run = make_run(2).open(initialized=False)
    run.do(run.opening.initial_weights(run.owner(0), "a", "coming", HOUR))
    assert weights(run, 0, "a", "staged") == "staged"
    run.redis.hset(run.key("shards"), "0:token", "99")
    assert weights(run, 1, "a", "staged") == "staged"
    assert weights(run, 0, "a", "staged") == "initialized"


def test_weights_are_refused_by_a_run_that_is_not_open_or_is_behind(run: DrivenRun) -> None:
    owner = run.owner()
    with pytest.raises(Behind):
        run.do(run.opening.initial_weights(owner._replace(position=LogPosition(2, 0)), "a", "coming", HOUR))
    with pytest.raises(Fenced):
        run.do(run.opening.initial_weights(owner._replace(token="1"), "a", "coming", HOUR))
    run.do(run.opening.give_up([owner]))
    with pytest.raises(ShardUnavailable) as refused:
        run.do(run.opening.initial_weights(owner, "a", "coming", HOUR))
    assert refused.value.extensions == {"missing": [0]}


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
