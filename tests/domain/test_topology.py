"""Where a run's shards are, and what is kept of its metrics."""

from __future__ import annotations

from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.domain.reports import Measured, with_measured
from freestep_service.domain.run_view import RunView
from freestep_service.domain.topology import Layout, topology

SPEC = RunSpec.model_validate(
    {
        "optimizer": {"algorithm": "sgd_schedule_free"},
        "parameters": [{"name": "w", "shape": [4, 5]}, {"name": "b", "shape": [3]}],
    }
)
RUN = {
    "spec": "{}", "batch": "1", "max_staleness": "none", "distinct": "0", "phase": "open", "generation": "1",
    "epoch": "3", "step": "7", "seq": "9", "initialized": "1", "shards": "2", "durable_step": "5",
}  # fmt: skip
SHARDS = {
    "0:node": "n", "0:url": "http://a:1", "0:token": "5", "0:ends": "1000", "0:applied": "6", "0:durable": "6",
    "1:node": "m", "1:url": "http://b:1", "1:token": "6", "1:ends": "900", "1:applied": "7",
}  # fmt: skip


def test_the_topology_names_owners_slices_and_steps() -> None:
    made = topology("run", Layout(Manifest.of(SPEC), 2), RunView(RUN, SHARDS, 0), 950, {})
    assert (made.run, made.epoch, made.missing) == ("run", 3, [1])
    first, second = made.shards
    assert (first.url, second.url) == ("http://a:1", None)
    assert (first.begin, first.end, second.begin, second.end) == (0, first.end, first.end, 23)
    assert [part.name for part in (*first.slices, *second.slices)] in (["w", "w", "b"], ["w", "b"])
    assert (first.applied_step, second.applied_step) == (6, 7)
    # A shard whose owner has said nothing of it has what all have.
    assert (first.durable_step, second.durable_step) == (6, 5)


def test_what_is_known_here_goes_before_what_redis_says() -> None:
    made = topology("run", Layout(Manifest.of(SPEC), 2), RunView(RUN, SHARDS, 0), 0, {1: 8})
    assert [shard.applied_step for shard in made.shards] == [6, 8]
    assert made.missing == []


def test_the_newest_steps_of_a_metric_are_kept() -> None:
    reported = with_measured({"other": {1: 0.5}}, Measured("loss", 3, 0.3))
    assert with_measured(reported, Measured("loss", 2, 0.2)) == {"other": {1: 0.5}, "loss": {2: 0.2, 3: 0.3}}
    for step in range(100):
        reported = with_measured(reported, Measured("loss", step, float(step)))
    assert list(reported["loss"]) == list(range(36, 100))


def test_what_is_applied_of_a_journaled_run_is_durable() -> None:
    standing = RunView(RUN, {**SHARDS, "0:host": "here"}, 0)
    made = topology("run", Layout(Manifest.of(SPEC), 2), standing, 0, {1: 8}, journaled=True)
    assert [shard.durable_step for shard in made.shards] == [6, 8]
    assert [shard.journal for shard in made.shards] == ["here", None]
