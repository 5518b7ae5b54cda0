"""A run over three hosts with four workers: every cable 50 ms long, 100 Mbit/s wide, and losing 1% of its frames.

The run of most tests is plain SGD with learning rate 1 and every gradient is -1, so its parameters count the pushes.
"""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch

from freestep import Client
from meanwhile import wait_until
from network.conftest import COMPANION, SHARDS, WORKERS, Training
from network.worker import COUNTERS
from plain_calls import slug

pytestmark = pytest.mark.slow


def start_all(training: Training) -> None:
    """Starts the four workers, the first and the last through the first host; returns when all push."""
    for number, worker in enumerate(WORKERS):
        training.start(worker, through=SHARDS[number % len(SHARDS)])
    training.go_on(3)


def surviving(pushes: list[dict[str, Any]]) -> list[int]:
    """The steps of those applied pushes that no later epoch went back behind, in order."""
    applied = [(push["epoch"], push["step"]) for push in pushes if push["decision"] == "applied"]
    return sorted(step for epoch, step in applied if all(step < later for other, later in applied if other > epoch))


def check_that_each_push_counts_once(training: Training, pushes: list[dict[str, Any]]) -> None:
    """Every step is one worker's push, every element counts them, and so does every shard."""
    api = training.api(SHARDS[0])
    step = api.status()["step"]
    assert surviving(pushes) == list(range(1, step + 1))
    wait_until(lambda: [shard["applied_step"] for shard in topology(training, SHARDS[0])["shards"]] == 3 * [step])
    for host in SHARDS:
        # A shard may be handed over at this moment, to a host that has come back.
        with Client(training.cluster.url(host), retry_for=60) as client:
            y, at = client.run(training.name).pull("y")
        assert at == step
        assert torch.equal(y["count"], torch.full((COUNTERS,), float(step)))


def topology(training: Training, host: str) -> dict[str, Any]:
    answer = training.api(host).http.get(f"/v1/runs/{training.name}/topology")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def owners(training: Training, host: str) -> list[str | None]:
    """The hosts that own the shards, by one host's topology."""
    shards = topology(training, host)["shards"]
    return [shard["url"] and training.cluster.host_of(shard["url"]) for shard in shards]


def test_workers_count_over_three_hosts(counting: Training) -> None:
    start_all(counting)
    assert sorted(str(host) for host in owners(counting, SHARDS[0])) == list(SHARDS)
    counting.go_on(8)
    pushes = counting.finish()
    check_that_each_push_counts_once(counting, pushes)
    status = counting.api(SHARDS[1]).status()
    assert status["epoch"] == 1
    assert status["pushes"] == {"applied": status["step"], "accumulated": 0, "dropped": 0}


def test_workers_learn_over_three_hosts(learning: Training) -> None:
    start_all(learning)
    learning.go_on(12)
    pushes = sorted(learning.finish(), key=lambda push: push["step"])
    losses = [push["loss"] for push in pushes]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_worker_that_is_cut_off_comes_back_by_itself(counting: Training) -> None:
    start_all(counting)
    cut, *others = WORKERS
    network, api = counting.cluster.network, counting.api(SHARDS[1])
    network.cut(cut)
    # Until its lease has expired.
    wait_until(lambda: cut not in [worker["worker"] for worker in api.status()["workers"]])
    counting.go_on(5, *others)
    network.heal(cut)
    counting.go_on(5)
    check_that_each_push_counts_once(counting, counting.finish())
    assert api.status()["epoch"] == 1


def test_a_host_that_is_cut_off_loses_its_shard_and_harms_nobody(counting: Training) -> None:
    start_all(counting)
    cut, *others = SHARDS
    network, api = counting.cluster.network, counting.api(others[0])
    (part,) = [shard for shard in topology(counting, cut)["shards"] if shard["url"] == counting.cluster.url(cut)]
    # A worker on the host that is cut off.
    counting.start(COMPANION, through=cut)
    counting.go_on(3)
    wait_until(lambda: bool(api.status()["checkpoint_step"]))
    network.cut(cut)
    wait_until(lambda: set(owners(counting, others[0])) == set(others))
    counting.go_on(5, "worker-1", "worker-2")
    lease = api.lease("beside")
    with network.inside(cut):
        # In its own network the host still answers, and still assumes that it owns its shard.
        zombie = counting.api(cut)
        answer = zombie.http.post(
            zombie.path("/gradients"),
            params={"shard": part["index"], "of": len(SHARDS)},
            content=safetensors.torch.save({"count": -torch.ones(part["end"] - part["begin"])}),
            headers=zombie.headers(lease, lease["step"]),
        )
    assert answer.status_code == 503
    assert slug(answer) in ("coordinator-unavailable", "shard-unavailable")
    network.heal(cut)
    counting.go_on(5)
    check_that_each_push_counts_once(counting, counting.finish())
    assert api.status()["epoch"] == 2
