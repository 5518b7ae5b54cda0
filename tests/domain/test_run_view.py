"""How a run stands in Redis, and what a damaged one lacks."""

from __future__ import annotations

import pytest

from freestep_service.domain.run_view import DamagedRun, RunView

RUN = {
    "spec": "{}", "batch": "1", "max_staleness": "none", "distinct": "0", "slack": "", "phase": "load",
    "generation": "12", "epoch": "2", "step": "7", "seq": "9", "initialized": "1", "shards": "2",
    "target": '{"cut": [2, 7, 9], "live": true}',
}  # fmt: skip
SHARDS = {
    "0:node": "n0", "0:url": "http://a:1", "0:host": "here 1", "0:token": "5", "0:ends": "1000",
    "1:node": "n1", "1:url": "http://b:1", "1:token": "6", "1:ends": "2000",
}  # fmt: skip


def test_a_view_is_read_by_name() -> None:
    view = RunView(RUN, SHARDS, 1000)
    assert (view.count, view.phase, view.generation, view.target()) == (2, "load", 12, {"cut": [2, 7, 9], "live": True})
    assert (view.number("seq"), view.number("applied"), view.field(1, "url")) == (9, 0, "http://b:1")
    assert (view.is_owned(0), view.is_owned(1), view.missing()) == (False, True, [0])
    assert RunView(RUN, {}, 0).missing() == [0, 1]
    # By their owners, whether these have let them lapse or not.
    assert (view.owned_by("n0"), view.owned_by("n1"), view.owned_by("n2")) == ({0: "5"}, {1: "6"}, {})
    # Before there were shards.
    assert RunView({name: value for name, value in RUN.items() if name != "shards"}, {}, 0).count == 1


@pytest.mark.parametrize(
    ("shard", "url", "host", "is_predecessor"),
    [
        (0, "http://a:1", "here 1", True),
        (0, "http://a:1", "there 2", False),
        (0, "http://b:1", "here 1", False),
        # Written by a version that kept no host.
        (1, "http://b:1", "there 2", True),
        (2, "http://b:1", "here 1", False),
    ],
)
def test_a_predecessor_has_the_same_url_and_host(shard: int, url: str, host: str, is_predecessor: bool) -> None:
    assert RunView(RUN, SHARDS, 0).was_owned_by_predecessor(shard, url, host) == is_predecessor


@pytest.mark.parametrize(
    "field",
    ["spec", "batch", "max_staleness", "distinct", "phase", "generation", "epoch", "step", "seq", "initialized"],
)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(DamagedRun, match=f"damaged: {field} is missing$"):
        RunView({name: value for name, value in RUN.items() if name != field}, SHARDS, 0)


def test_every_fault_is_named() -> None:
    with pytest.raises(DamagedRun) as damaged:
        RunView({"durable": "1-2-3", "durable_step": "two"}, {"0:node": "n", "0:ends": "soon"}, 0)
    message = str(damaged.value)
    assert message.startswith("the run's part of Redis is damaged: spec is missing, ")
    for fault in ("generation is missing", "0:token is missing", "durable_step is not a number", "0:ends is not a n"):
        assert fault in message


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("phase", "asleep", "phase is 'asleep'"),
        ("seq", "9.5", "seq is not a number"),
        ("epoch", "", "epoch is not a number"),
        ("shards", "two", "shards is not a number"),
    ],
)
def test_a_value_that_cannot_be_is_named(field: str, value: str, fault: str) -> None:
    with pytest.raises(DamagedRun, match=fault):
        RunView(RUN | {field: value}, SHARDS, 0)


def test_what_is_loaded_is_known_while_it_is_loaded() -> None:
    without = {name: value for name, value in RUN.items() if name != "target"}
    with pytest.raises(DamagedRun, match="target is missing"):
        RunView(without, SHARDS, 0)
    RunView(without | {"phase": "gather"}, SHARDS, 0)


def test_a_run_that_redis_lost_has_no_state_yet() -> None:
    lost = {name: value for name, value in RUN.items() if name not in ("epoch", "step", "seq", "initialized")}
    view = RunView(lost | {"lost": "1", "phase": "gather"}, {}, 0)
    assert (view.number("epoch"), view.number("initialized")) == (0, 0)
