"""The commit log: its entries, how it is trimmed, and what else takes a place in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordination.driven import DrivenRun
from freestep.errors import (
    EpochChanged,
    IdempotencyConflict,
    MalformedRequest,
    RunNotInitialized,
    ShardUnavailable,
)
from freestep_service.coordination.nodes import Node
from freestep_service.domain.records import Behind, CheckpointId, Fenced, LogPosition, LogTruncated, RunState
from freestep_service.domain.reports import Measured

Make = Callable[..., DrivenRun]


def seqs(run: DrivenRun, after: int, epoch: int = 1) -> list[int]:
    return [entry["seq"] for entry in run.do(run.log.entries(LogPosition(epoch, after)))]


def fill(run: DrivenRun, count: int) -> None:
    """Appends so many entries to the log."""
    run.do(marked(run, count))


async def marked(run: DrivenRun, count: int) -> None:
    owner = run.owner()
    for _ in range(count):
        await run.log.mark_checkpoint(owner)


# Entries


def test_the_entries_after_a_position_are_read(run: DrivenRun) -> None:
    assert seqs(run, 0) == []
    fill(run, 5)
    assert seqs(run, 0) == [1, 2, 3, 4, 5]
    assert seqs(run, 3) == [4, 5]
    assert seqs(run, 5) == []
    assert run.do(run.log.entries(LogPosition(1, 4))) == run.entries()[4:]


def test_the_log_of_another_epoch_has_no_entries(run: DrivenRun) -> None:
    fill(run, 3)
    run.do(run.opening.gather(run.shards))
    run.reopen(RunState(2, seq=2, initialized=True))
    fill(run, 2)
    assert seqs(run, 0) == []
    assert seqs(run, 2, epoch=2) == [3, 4]
    run.redis.delete(*run.dump())
    assert seqs(run, 2, epoch=2) == []


def test_a_log_that_begins_behind_a_position_is_told_apart(run: DrivenRun) -> None:
    fill(run, 5)
    run.redis.xtrim(run.key("log"), maxlen=2, approximate=False)
    assert seqs(run, 3) == [4, 5]
    with pytest.raises(LogTruncated) as truncated:
        seqs(run, 2)
    assert truncated.value.first_seq == 4
    run.redis.delete(run.key("log"))
    assert seqs(run, 5) == []
    with pytest.raises(LogTruncated) as truncated:
        seqs(run, 4)
    assert truncated.value.first_seq == 6


# Trimming


def applied(run: DrivenRun, *newest: int) -> None:
    positions = {shard: LogPosition(1, seq) for shard, seq in enumerate(newest)}
    run.do(run.opening.heartbeat(run.node, (), {}, positions))


def test_the_log_keeps_the_entries_that_a_shard_has_not_applied(run: DrivenRun) -> None:
    applied(run, *[100 + shard for shard in range(run.shards)])
    fill(run, 3000)
    # Whole nodes of the stream are trimmed, of 100 entries each.
    first = run.entries()[0]["seq"]
    assert 1 <= first <= 101
    assert seqs(run, 100)[0] == 101
    applied(run, *[3000] * run.shards)
    fill(run, 64)
    assert 1024 <= run.redis.xlen(run.key("log")) <= 1024 + 64 + 100


def test_one_shard_that_is_behind_keeps_the_log(make_run: Make) -> None:
    run = make_run(3).open()
    applied(run, 2000, 50, 2000)
    fill(run, 2000)
    assert seqs(run, 50)[0] == 51


def test_the_log_of_a_shard_that_reports_nothing_is_bounded(make_run: Make) -> None:
    run = make_run().open()
    entry = '{"seq": 0}'
    with run.redis.pipeline() as pipeline:
        for seq in range(1, 17_000):
            pipeline.xadd(run.key("log"), {"entry": entry}, id=f"{seq}-0")
        pipeline.hset(run.key("run"), "seq", 16_999)
        pipeline.execute()
    fill(run, 64)
    assert 16_384 <= run.redis.xlen(run.key("log")) <= 16_384 + 64 + 100


def test_a_new_owner_keeps_the_log_until_it_reports(make_run: Make) -> None:
    run = make_run().open()
    applied(run, 5000)
    run.redis.hset(run.key("shards"), "0:ends", 1)
    other = Node("http://other:1", 3_600_000)
    run.heartbeat(other, 0)
    assert run.shard_field(0, "applied_seq") is None


# Metrics


def report(
    run: DrivenRun, value: float, step: int = 0, name: str = "loss", epoch: int | None = None, shard: int = 0
) -> tuple[int, dict[str, object] | None]:
    return run.do(run.log.report_metric(run.owner(shard), Measured(name, step, value), epoch))


def test_a_report_counts_once_and_takes_a_place_in_the_log(run: DrivenRun) -> None:
    epoch, entry = report(run, 0.1)
    assert entry is not None
    assert (epoch, entry["seq"]) == (1, 1)
    assert run.entries()[0]["measured"] == entry["measured"] == {"name": "loss", "step": 0, "value": "0.1"}
    before = run.dump()
    assert report(run, 0.1, epoch=1, shard=run.shards - 1) == (1, None)
    with pytest.raises(IdempotencyConflict):
        report(run, 0.2)
    assert run.dump() == before
    metrics = run.do(run.log.metrics())
    assert (metrics["loss"].value, metrics["loss"].step) == (0.1, 0)


def test_reports_are_refused(run: DrivenRun) -> None:
    before = run.dump()
    with pytest.raises(MalformedRequest):
        report(run, 1.0, step=1)
    with pytest.raises(EpochChanged):
        report(run, 1.0, epoch=2)
    with pytest.raises(Behind):
        run.do(run.log.report_metric(run.owner()._replace(position=LogPosition(1, 1)), Measured("m", 0, 1.0), None))
    with pytest.raises(Fenced):
        run.do(run.log.report_metric(run.owner()._replace(token="1"), Measured("m", 0, 1.0), None))
    assert run.dump() == before
    run.redis.hset(run.key("run"), "initialized", 0)
    with pytest.raises(RunNotInitialized):
        report(run, 1.0)


def test_the_newest_steps_of_a_metric_are_kept(run: DrivenRun) -> None:
    run.redis.hset(run.key("run"), "step", 100)
    for step in range(10, 74):
        report(run, 1.0, step)
    with pytest.raises(MalformedRequest, match="before step 10"):
        report(run, 1.0, 9)
    report(run, 1.0, 74)
    with pytest.raises(MalformedRequest, match="before step 11"):
        report(run, 1.0, 10)


def test_a_run_has_a_limited_number_of_metrics(run: DrivenRun) -> None:
    for number in range(64):
        report(run, 1.0, name=f"metric-{number}")
    with pytest.raises(MalformedRequest, match="64 metrics"):
        report(run, 1.0, name="one more")
    report(run, 1.0, step=0, name="metric-0")


# Reads


def test_a_read_gets_a_place_in_the_log_that_its_readers_share(make_run: Make) -> None:
    run = make_run(2).open()
    owners = [run.owner(shard) for shard in (0, 1)]
    places = [run.do(run.log.request_read(owner, "ticket", "y F32", 2)) for owner in owners]
    assert places == [1, 1]
    assert run.entries()[0]["cuts"] == {"ticket": "y F32"}
    run.do(run.log.reads_sent(["ticket"]))
    assert run.redis.hlen(run.key("cuts")) == 1
    run.do(run.log.reads_sent(["ticket"]))
    assert run.redis.hlen(run.key("cuts")) == 0


def test_reads_are_refused_where_redis_is_behind(make_run: Make) -> None:
    run = make_run(2).open()
    with pytest.raises(Behind):
        run.do(run.log.request_read(run.owner()._replace(position=LogPosition(1, 1)), "ticket", "y F32", 2))


# Checkpoints


def test_a_checkpoint_is_durable_once_all_parts_are_written(run: DrivenRun) -> None:
    checkpoint = run.do(run.log.mark_checkpoint(run.owner()))
    assert checkpoint == CheckpointId(1, 0, 1)
    assert run.entries()[0]["checkpoint"] is True
    shards = range(run.shards)
    durable = [run.do(run.log.part_written(run.owner(shard), checkpoint, 100)) for shard in shards]
    assert durable == [False] * (run.shards - 1) + [True]
    view = run.view()
    assert (view.run["durable"], view.number("durable_step")) == ("1-0-1", 0)
    assert view.field(0, "durable") == "0"
    with pytest.raises(Fenced):
        run.do(run.log.part_written(run.owner()._replace(token="1"), checkpoint, 100))


def test_parts_of_different_checkpoints_make_none(make_run: Make) -> None:
    run = make_run(2).open()
    first, second = (run.do(run.log.mark_checkpoint(run.owner())) for _ in range(2))
    assert not run.do(run.log.part_written(run.owner(0), second, 100))
    assert not run.do(run.log.part_written(run.owner(1), first, 100))
    assert "durable" not in run.view().run


def test_checkpoints_are_not_marked_in_a_run_that_is_not_open(run: DrivenRun) -> None:
    owner = run.owner()
    with pytest.raises(Behind):
        run.do(run.log.mark_checkpoint(owner._replace(position=LogPosition(3, 0))))
    with pytest.raises(Fenced):
        run.do(run.log.mark_checkpoint(owner._replace(token="1")))
    run.do(run.opening.gather(run.shards))
    with pytest.raises(ShardUnavailable):
        run.do(run.log.mark_checkpoint(owner))
