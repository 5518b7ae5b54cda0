"""Units of data sets that are lost to a push on its way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordination.driven import DrivenRun
from freestep.api.data import DataSpec
from freestep.errors import ShardUnavailable, UnitNotHeld
from freestep_service.domain.data_sets import DataSets, NewDataSet
from freestep_service.domain.records import Lost, RunState


def test_of_two_pushes_with_one_unit_the_first_to_be_committed_counts(run: DrivenRun) -> None:
    data, lease = run.coordinator.data, run.grant()
    run.do(data.create(run.owner(), NewDataSet("train", DataSpec(length=10, unit=1))))
    run.do(data.claim(run.owner(), lease.lease, lease.token, "train", 2, ""))
    one, other = (replace(run.claim(lease, key), units={"train": (0,)}) for key in ("one", "other"))
    for claim in (one, other):
        for shard in range(run.shards):
            run.admit(claim, shard)
    for shard in range(run.shards):
        record = run.commit(other, shard)
    assert record is not None and record.counted == {"train": (0,)}
    for shard in range(run.shards - 1):
        assert run.commit(one, shard) is None
    before = run.number("seq")
    with pytest.raises(UnitNotHeld):
        run.commit(one, run.shards - 1)
    assert run.number("seq") == before
    with pytest.raises(Lost):
        run.commit(one)
    (view,) = run.do(data.read_all())
    assert (view.done, [each.number for each in view.out]) == (1, [1])


def test_a_unit_that_was_given_back_meanwhile_does_not_count(run: DrivenRun) -> None:
    data, lease = run.coordinator.data, run.grant()
    run.do(data.create(run.owner(), NewDataSet("train", DataSpec(length=10, unit=1))))
    run.do(data.claim(run.owner(), lease.lease, lease.token, "train", 2, ""))
    claim = replace(run.claim(lease, "key"), units={"train": (0, 1)})
    for shard in range(run.shards):
        run.admit(claim, shard)
    assert run.do(data.give_back(lease.lease, lease.token, "train", [1])) == [1]
    for shard in range(run.shards - 1):
        assert run.commit(claim, shard) is None
    with pytest.raises(UnitNotHeld) as refused:
        run.commit(claim, run.shards - 1)
    assert refused.value.extensions == {"units": "train=1"}
    # The rest stays with the lease, for another push.
    assert run.push(replace(run.claim(lease, "again"), units={"train": (0,)})).decision == "applied"


@pytest.mark.parametrize("is_gathered", [False, True])
def test_what_redis_has_lost_of_a_run_is_not_taken_for_a_run_without_data(run: DrivenRun, is_gathered: bool) -> None:
    """Until its shards have restored it, whoever asks is to ask again."""
    lease, data = run.grant(), run.coordinator.data
    spec = DataSpec(length=8, unit=1)
    run.do(data.create(run.owner(), NewDataSet("train", spec)))
    run.do(data.claim(run.owner(), lease.lease, lease.token, "train", 3, ""))
    run.redis.delete(run.key("run"))
    if is_gathered:
        run.do(run.opening.gather(run.shards))
    with pytest.raises(ShardUnavailable):
        run.do(data.give_back(lease.lease, lease.token, "train"))
    with pytest.raises(ShardUnavailable):
        run.do(data.read("train"))
    with pytest.raises(ShardUnavailable):
        run.do(data.read_all())
    if not is_gathered:
        run.do(run.opening.gather(run.shards))
    known = DataSets()
    known.add(NewDataSet("train", spec))
    run.reopen(RunState(1, 0, 1, initialized=True, data=known))
    assert run.do(data.read("train")).spec == spec
    assert run.do(data.give_back(lease.lease, lease.token, "train")) == []
