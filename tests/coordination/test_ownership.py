"""Shards have one owner each, who keeps them by its heartbeat."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordination.driven import HOUR, DrivenRun
from freestep_service.coordination.nodes import Node
from freestep_service.domain.records import Fenced, LogPosition, RunState

Make = Callable[..., DrivenRun]

HERE, THERE = "here boot-1", "there boot-2"


def node(url: str = "http://other:1", host: str = HERE) -> Node:
    return Node(url, HOUR, host=host)


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


def test_an_opening_waits_for_an_owner_whose_heartbeat_comes_late(make_run: Make) -> None:
    run, other = make_run(2), node()
    run.do(run.opening.create(1, 2))
    run.heartbeat(None, 0)
    run.heartbeat(other, 1)
    gathered = run.number("generation")
    for shard in range(2):
        run.do(run.opening.report_shard(run.owner(shard), gathered, "{}"))
    assert run.do(run.opening.open(RunState(1), 2, gathered, {"cut": None, "live": False}))
    loading = run.number("generation")
    run.do(run.opening.loaded(run.owner(0), loading))
    run.pass_time(HOUR)
    seen = run.heartbeat()
    assert seen is not None
    assert (seen.missing(), seen.phase, seen.generation) == ([1], "load", loading)
    late = run.heartbeat(other)
    assert late is not None
    assert (late.missing(), late.phase, late.generation) == ([], "load", loading)
    assert run.do(run.opening.loaded(run.owner(1), loading)) == "open"


def test_an_opening_begins_again_when_a_shard_is_taken_from_an_owner_that_is_silent(make_run: Make) -> None:
    run, other = make_run(2), node()
    run.do(run.opening.create(1, 2))
    run.heartbeat(None, 0)
    run.heartbeat(other, 1)
    gathered = run.number("generation")
    assert run.do(run.opening.open(RunState(1), 2, gathered, {"cut": None, "live": False}))
    run.pass_time(HOUR)
    taken = run.heartbeat(None, 1)
    assert taken is not None
    assert (taken.missing(), taken.phase, taken.generation > gathered) == ([], "gather", True)


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
    left = {f"{shard}:left_url": run.node.url for shard in range(run.shards)}
    assert run.redis.hgetall(run.key("shards")) == left
    assert all(view.was_owned_at(shard, run.node.url) for shard in range(run.shards))
    run.do(run.opening.give_up(owners))
    assert run.view().generation == view.generation
    assert run.heartbeat(node(), *range(run.shards)) is not None
    assert not left.keys() & run.redis.hgetall(run.key("shards")).keys()
