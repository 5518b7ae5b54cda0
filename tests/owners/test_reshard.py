"""Another number of shards: the same run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from freestep import EpochChanged, Run
from harness import ThreadService
from owners.counted import PUSHED, count, create, equal, points, push
from plain_calls import Api, slug


@pytest.mark.parametrize("algorithm", ["sgd", "adamw_schedule_free"])
def test_another_number_of_shards_is_the_same_run(
    shared_nodes: Callable[..., list[ThreadService]], run_of: Callable[..., Run], algorithm: str
) -> None:
    url = shared_nodes(2)[0].url
    run, straight = run_of(url), run_of(url, "-straight")
    # Others would follow the number of live workers, of which one of the runs has one more.
    correction = {} if algorithm == "sgd" else {"delay_correction": {"name": "ahead", "expected_staleness": 3}}
    for each in (run, straight):
        create(each, 1, optimizer={"algorithm": algorithm, **correction})
        push(each, 3)
    epoch = 1
    for shards in (3, 5, 2, 1):
        before = points(run)
        lease = run.lease("before")
        status = run.reshard(shards)
        epoch += 1
        assert (status.shards, status.step, status.epoch) == (shards, status.step, epoch)
        assert len(run.topology().shards) == shards
        assert {shard.durable_step for shard in run.topology().shards} == {status.step}
        assert equal(points(run), before)
        with pytest.raises(EpochChanged):
            run.push(PUSHED, lease.claim(status.step))
        push(run)
        push(straight)
        assert equal(points(run), points(straight))
    assert run.reshard(1).epoch == epoch


def test_a_push_whose_answer_was_lost_before_a_reshard_is_found_after_it(
    service: ThreadService, run_of: Callable[..., Run]
) -> None:
    run = run_of(service.url)
    create(run, 1)
    lease = run.lease("worker")
    claim = lease.claim(0)
    receipt = run.push(PUSHED, claim)
    for shards in (3, 2, 1, 3):
        run.reshard(shards)
        again = run.push(PUSHED, claim)
        assert (again.step, again.decision, again.replayed) == (receipt.step, receipt.decision, True)
        assert count(run) == 1


def test_a_checkpoint_of_one_number_of_shards_is_restored_by_another(
    service: ThreadService, run_of: Callable[..., Run]
) -> None:
    run = run_of(service.url)
    create(run, 4, optimizer={"algorithm": "adamw_schedule_free"})
    push(run, 3)
    run.checkpoint()
    before = points(run)
    run.reshard(3)
    push(run, 2)
    assert run.restore(3).step == 3
    assert equal(points(run), before)


def test_a_run_without_checkpoints_is_not_resharded(api: Api) -> None:
    api.create(durability="none", shards=2)
    for wish, status, problem in (
        ({"shards": 3}, 422, "invalid-spec"),
        ({"shards": 0}, 400, "malformed-request"),
        ({"shards": "3"}, 400, "malformed-request"),
        ({}, 400, "malformed-request"),
    ):
        refused = api.http.post(api.path("/reshard"), json=wish)
        assert (refused.status_code, slug(refused)) == (status, problem)
    assert (api.status()["shards"], api.status()["epoch"]) == (2, 1)
