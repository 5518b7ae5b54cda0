"""Krum over several shards: updates are those of one shard, and what comes while one waits for the others' parts."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from redis import Redis
from torch import Tensor

from chaos.relay import Relay
from freestep_service.coordination.coordinator import Coordinator
from freestep_service.coordination.store import Store
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.distances import part_of
from freestep_service.domain.records import LogPosition, Owner
from harness import ProcessService, ThreadService, store
from krum_twin import krum_twin
from meanwhile import Call, under_way, wait_until
from plain_calls import SGD, ShardedApi, persistently, slug
from shards.runs import NONE_LEFT, SIZES, ZEROS, leftovers, sharded, wholly

WORKERS = 5
QUORUM: dict[str, Any] = {"policy": "quorum", "batch": WORKERS, "robust": "krum", "f": 1}


def gradients(update: int) -> list[dict[str, Tensor]]:
    """Those of an update's workers, of which one is far from the others."""
    found = []
    for worker in range(WORKERS):
        generator = torch.Generator().manual_seed(WORKERS * update + worker)
        found.append({name: torch.randn(size, generator=generator) for name, size in SIZES.items()})
    found[update % WORKERS] = {name: 1000 * tensor for name, tensor in found[update % WORKERS].items()}
    return found


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def push(api: ShardedApi, update: int, worker: int, step: int, key: str | None = None) -> list[httpx.Response]:
    bodies, lease = api.bodies(gradients(update)[worker]), api.lease(f"worker-{worker}")
    return api.push_parts(lease, step, key or uuid.uuid4().hex, bodies)


def distances(api: ShardedApi, update: int, shard: int) -> Tensor:
    """A shard's part of those between an update's pushes, squared."""
    parts = [safetensors.torch.load(api.part(tensors, shard)) for tensors in gradients(update)]
    in_order = [flat({name: part[name] for name in SIZES if name in part}) for part in parts]
    return torch.pdist(torch.stack(in_order).double()).square()


def decisions(answers: list[httpx.Response]) -> set[str]:
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    return {answer.json()["decision"] for answer in answers}


def gather(api: ShardedApi, update: int, count: int = WORKERS - 1, step: int | None = None) -> None:
    """Pushes of an update's first workers."""
    for worker in range(count):
        assert decisions(push(api, update, worker, update if step is None else step)) == {"accumulated"}


def updated(api: ShardedApi, update: int, step: int | None = None) -> None:
    """Makes an update of all workers' pushes."""
    gather(api, update, step=step)
    assert decisions(push(api, update, WORKERS - 1, update if step is None else step)) == {"applied"}


def after(updates: int, m: int = 1) -> Tensor:
    """The weights after so many updates of SGD with learning rate 1, in fp64."""
    total = torch.zeros_like(flat(ZEROS)).double()
    for update in range(updates):
        total -= krum_twin([flat(each).double() for each in gradients(update)], 1, m)
    return total


def assert_at(api: ShardedApi, updates: int, m: int = 1) -> None:
    tensors, step = api.pull("y")
    assert step == updates
    found = flat({name: tensors[name] for name in SIZES}).double()
    torch.testing.assert_close(found, after(updates, m), rtol=1e-6, atol=1e-5)


def spec(shards: int, aggregation: dict[str, Any], **changes: Any) -> dict[str, Any]:
    parameters = [{"name": name, "shape": list(size)} for name, size in SIZES.items()]
    changes = {"optimizer": SGD, "durability": "none", **changes}
    return {"parameters": parameters, "aggregation": aggregation, "shards": shards, "tensors": ZEROS, **changes}


# As on one shard


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("policy", ["sync", "quorum", "buffered", "rennala"])
def test_updates_of_several_shards_are_those_of_one(nodes: list[ThreadService], policy: str, m: int) -> None:
    size = {"max_batch": WORKERS} if policy == "sync" else {"batch": WORKERS}
    aggregation = {"policy": policy, **size, "robust": "krum", "f": 1, "m": m}
    bodies = []
    with nodes[0].redis() as redis:
        # Two processes and three, twice; and one for comparison.
        for number, shards in enumerate((1, 2, 3, 3)):
            with sharded(nodes, number % len(nodes)) as api:
                api.create(**spec(shards, aggregation))
                for worker in range(WORKERS if policy == "sync" else 0):
                    api.lease(f"worker-{worker}")
                for update in range(3):
                    updated(api, update)
                    bodies.append((update, wholly(api, "y", nodes)))
                assert_at(api, 3, m)
                wait_until(lambda api=api: leftovers(redis, api) == NONE_LEFT)  # type: ignore[misc]
    assert len(set(bodies)) == 3


def test_y_of_the_update_is_in_the_answers_of_the_push_that_makes_it(nodes: list[ThreadService]) -> None:
    with sharded(nodes) as api:
        api.create(**spec(3, QUORUM))
        gather(api, 0)
        bodies, lease = api.bodies(gradients(0)[-1]), api.lease("worker-4")
        answers = api.push_parts(lease, 0, "last", bodies, Prefer="return=representation")
        assert {answer.headers["Freestep-Decision"] for answer in answers} == {"applied"}
        assert {answer.headers["Freestep-Step"] for answer in answers} == {"1"}
        sent = b"".join(answer.content[8 + int.from_bytes(answer.content[:8], "little") :] for answer in answers)
        assert len(sent) == 4 * flat(ZEROS).numel()
        assert_at(api, 1)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pushes", [1, 2, 4])
def test_a_leases_end_closes_an_update_of_few_pushes(nodes: list[ThreadService], shards: int, pushes: int) -> None:
    with sharded(nodes) as api:
        api.create(**spec(shards, {"policy": "sync", "max_batch": 6, "robust": "krum", "f": 1}))
        leases = [api.lease(f"worker-{worker}") for worker in range(pushes + 1)]
        for worker in range(pushes):
            api.push_parts(leases[worker], 0, uuid.uuid4().hex, api.bodies(gradients(0)[worker]))
        assert api.http.delete(api.path(f"/leases/{leases[-1]['lease']}")).status_code == 204
        wait_until(lambda: api.status()["step"] == 1)
        tensors, _ = api.pull("y")
        expected = -krum_twin([flat(each).double() for each in gradients(0)[:pushes]], 1, 1)
        found = flat({name: tensors[name] for name in SIZES}).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_updates_go_on_over_other_numbers_of_shards(nodes: list[ThreadService]) -> None:
    with sharded(nodes) as api:
        api.create(**spec(1, QUORUM, durability="checkpoint"))
        for update, shards in enumerate((3, 2, 3, 1)):
            gather(api, update, count=2)
            assert api.http.post(api.path("/reshard"), json={"shards": shards}).is_success
            api.shards = api.http.get(api.path("/topology")).json()["shards"]
            for worker in range(2, WORKERS):
                answers = push(api, update, worker, update)
            assert decisions(answers) == {"applied"}
            assert_at(api, update + 1)


# While an update waits


@contextmanager
def waiting(api: ShardedApi, redis: Redis, update: int) -> Iterator[Call[list[httpx.Response]]]:
    """An update whose parts of distances Redis does not take until the block ends; and the push that makes it."""
    gather(api, update)
    seq = int(str(redis.hget(api.redis_key("run"), "seq")))
    redis.rename(api.redis_key("distances"), "aside") if redis.exists(api.redis_key("distances")) else None
    redis.set(api.redis_key("distances"), "no hash")
    last = under_way(partial(push, api, update, WORKERS - 1, update, f"last-{update}"))
    wait_until(lambda: int(str(redis.hget(api.redis_key("run"), "seq"))) > seq)
    try:
        yield last
    finally:
        redis.delete(api.redis_key("distances"))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is to be opened again waits for the others for as long as they take."""
    monkeypatch.setattr("freestep_service.runs.standing._CATCHING_UP_S", 60.0)


@pytest.fixture
def kept(nodes: list[ThreadService]) -> Iterator[ShardedApi]:
    """A run of three shards that has made one update, and keeps checkpoints."""
    with sharded(nodes) as api:
        api.create(**spec(3, QUORUM, durability="checkpoint"))
        updated(api, 0)
        yield api


def test_what_comes_meanwhile_comes_after_the_update(kept: ShardedApi, redis: Redis) -> None:
    with waiting(kept, redis, 1) as last:
        checkpoint = under_way(lambda: kept.http.post(kept.path("/checkpoints")))
        parts = under_way(partial(kept.pull_parts, "meanwhile", "y"))
        # It is of the next update, and staleness counts from this one.
        follower = under_way(partial(push, kept, 2, 0, 2))
        wait_until(lambda: redis.hget(kept.redis_key("run"), "grouped") == "1")
        assert kept.status()["step"] == 1
        assert not last.done()
        assert not checkpoint.done()
    assert decisions(last.result()) == {"applied"}
    assert decisions(follower.result()) == {"accumulated"}
    assert checkpoint.result().json()["step"] == 2
    assert {answer.headers["Freestep-Step"] for answer in parts.result()} == {"2"}
    assert_at(kept, 2)
    assert kept.status()["epoch"] == 1


def test_distances_that_were_told_unheard_are_asked_for(kept: ShardedApi, redis: Redis) -> None:
    with waiting(kept, redis, 1) as last:
        parts = [part_of(distances(kept, 1, shard)) for shard in range(3)]
        place = f"1-{redis.hget(kept.redis_key('run'), 'seq')}"
        with redis.pipeline(transaction=True) as stroke:
            stroke.delete(kept.redis_key("distances"))
            stroke.hset(kept.redis_key("distances"), "all", " ".join([place, *parts]))
            stroke.execute()
        assert decisions(last.result()) == {"applied"}
    assert_at(kept, 2)


def test_parts_that_redis_has_lost_are_reported_again(kept: ShardedApi, redis: Redis) -> None:
    owners = {shard: redis.hget(kept.redis_key("shards"), f"{shard}:token") for shard in range(3)}
    with waiting(kept, redis, 1) as last:
        # One is fenced off until its owner reads who owns what.
        redis.hset(kept.redis_key("shards"), "2:token", "1")
        redis.delete(kept.redis_key("distances"))
        wait_until(lambda: redis.hkeys(kept.redis_key("distances")) != [])
        redis.delete(kept.redis_key("distances"))
        redis.hset(kept.redis_key("shards"), "2:token", str(owners[2]))
        assert decisions(last.result()) == {"applied"}
    assert_at(kept, 2)
    assert kept.status()["epoch"] == 1


def test_distances_that_one_has_not_heard_and_redis_has_lost_are_reported_again(
    start_service: Callable[..., ThreadService], tmp_path: Path
) -> None:
    with store("redis", tmp_path) as url, Redis.from_url(url, decode_responses=True) as redis:
        relay = Relay(int(url.rpartition(":")[2]))
        shared = {"checkpoint_url": str(tmp_path / "checkpoints"), "owner_ttl_seconds": 60.0}
        urls = [url, url, f"redis://127.0.0.1:{relay.port}"]
        services = [
            start_service(tmp_path / f"node-{number}", redis_url=each, **shared) for number, each in enumerate(urls)
        ]
        with sharded(services) as api:
            api.create(**spec(3, QUORUM, durability="checkpoint"))
            (deaf,) = [index for index, each in enumerate(api.shards) if each["url"] == services[2].url]
            with waiting(api, redis, 0) as last:
                key = api.redis_key("distances")
                relay.hold()
                # As if its report had been the last before it lost its connections.
                place = f"1-{redis.hget(api.redis_key('run'), 'seq')}"
                with redis.pipeline(transaction=True) as stroke:
                    stroke.delete(key)
                    stroke.hset(key, str(deaf), f"{place} {part_of(distances(api, 0, deaf))}")
                    stroke.execute()
                wait_until(lambda: redis.hkeys(key) == ["all"])
                wait_until(lambda: all(_applied(service, api.run) == 1 for service in services[:2]))
                redis.delete(key)
                relay.cut()
                relay.free()
                assert decisions(last.result()) == {"applied"}
            assert_at(api, 1)
            assert api.status()["epoch"] == 1
        ThreadService.stop_all(services)
        relay.close()


def _applied(service: ThreadService, run: str) -> int:
    """The step of the shard that a service has of a run."""
    owner = service.registry.get(run)
    return next(owner.shard(index).core.writer.applied_step for index in range(3) if owner.owns(index))


@pytest.mark.usefixtures("patient")
def test_a_run_that_is_divided_meanwhile_has_the_update(kept: ShardedApi, redis: Redis) -> None:
    with waiting(kept, redis, 1) as last:
        resharding = under_way(lambda: kept.http.post(kept.path("/reshard"), json={"shards": 2}))
        wait_until(lambda: redis.hget(kept.redis_key("run"), "phase") == "gather")
    assert resharding.result().is_success, resharding.result().text
    assert decisions(last.result()) == {"applied"}
    kept.shards = kept.http.get(kept.path("/topology")).json()["shards"]
    assert len(kept.shards) == 2
    assert_at(kept, 2)
    assert kept.status()["epoch"] == 2
    updated(kept, 2)
    assert_at(kept, 3)


def test_a_run_that_is_restored_meanwhile_has_no_trace_of_the_update(kept: ShardedApi, redis: Redis) -> None:
    assert kept.http.post(kept.path("/checkpoints")).json()["step"] == 1
    with waiting(kept, redis, 1) as last:
        assert kept.http.post(kept.path("/checkpoints/1/restore")).is_success
        assert {slug(answer) for answer in last.result()} <= {"shard-unavailable", "epoch-changed", "lease-expired"}
    assert (kept.status()["epoch"], kept.status()["step"]) == (2, 1)
    updated(kept, 1)
    assert_at(kept, 2)


def test_a_run_that_is_deleted_meanwhile_is_gone(nodes: list[ThreadService], kept: ShardedApi, redis: Redis) -> None:
    with waiting(kept, redis, 1) as last:
        assert kept.http.delete(kept.path()).is_success
        assert {slug(answer) for answer in last.result()} <= {"shard-unavailable", "run-not-found"}
    wait_until(lambda: all(kept.run not in [run.name for run in node.registry.all()] for node in nodes))
    assert redis.keys(kept.redis_key("*")) == [kept.redis_key("deleted")]
    kept.create(**spec(3, QUORUM))
    updated(kept, 0)
    assert_at(kept, 1)


@pytest.mark.parametrize("shards", [2, 3])
def test_a_store_that_is_wiped_meanwhile_is_written_anew(
    start_service: Callable[..., ThreadService], tmp_path: Path, shards: int
) -> None:
    with store("valkey", tmp_path) as url, Redis.from_url(url, decode_responses=True) as redis:
        shared = {"redis_url": url, "checkpoint_url": str(tmp_path / "checkpoints")}
        services = [start_service(tmp_path / f"node-{number}", **shared) for number in range(2)]
        with sharded(services) as api:
            api.create(**spec(shards, QUORUM, durability="checkpoint"))
            updated(api, 0)
            with waiting(api, redis, 1) as last:
                redis.flushall()
                answers = last.result()
            assert {slug(answer) for answer in answers} <= {"shard-unavailable", "lease-expired"}
            # Nobody has made the update, and all have the pushes before it.
            lease = persistently(lambda: api.http.post(api.path("/leases"), json={"worker": "worker-4"})).json()
            bodies = api.bodies(gradients(1)[-1])
            parts = [
                under_way(partial(persistently, partial(api.push_part, shard, lease, 1, "again", bodies[shard])))
                for shard in range(shards)
            ]
            assert decisions([part.result() for part in parts]) == {"applied"}
            assert_at(api, 2)
            assert api.status()["epoch"] == 1
        ThreadService.stop_all(services)


def test_a_push_whose_update_waits_for_long_is_answered_and_found_again(
    start_service: Callable[..., ThreadService],
) -> None:
    service = start_service(commit_seconds=0.2)
    with service.redis() as redis, sharded([service]) as api:
        api.create(**spec(2, QUORUM))
        with waiting(api, redis, 0) as last:
            assert {slug(answer) for answer in last.result()} == {"shard-unavailable"}
            assert (redis.hget(api.redis_key("run"), "step"), api.status()["step"]) == ("1", 0)
        wait_until(lambda: api.status()["step"] == 1)
        assert_at(api, 1)
        record = json.loads(str(redis.hget(api.redis_key("receipts"), "last-0")))
        lease, token, *_ = record["claim"].split()
        bodies = api.bodies(gradients(0)[-1])
        answers = api.push_parts({"lease": lease, "token": token}, 0, "last-0", bodies)
        assert decisions(answers) == {"applied"}
        assert all(answer.json()["replayed"] for answer in answers)
        assert api.status()["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("reports", [False, True])
def test_a_process_that_is_killed_meanwhile_takes_the_update_with_it(
    start_process: Callable[..., ProcessService], tmp_path: Path, reports: bool
) -> None:
    """All shards go back to the checkpoint, whether or not others have made the update with its report."""
    with store("valkey", tmp_path) as url, Redis.from_url(url, decode_responses=True) as redis:
        shared = {"redis_url": url, "checkpoint_url": str(tmp_path / "checkpoints"), "owner_ttl_seconds": 60}
        processes = [start_process(tmp_path / f"process-{number}", **shared) for number in range(2)]
        with sharded(processes) as api:
            api.create(**spec(2, QUORUM, durability="checkpoint"))
            updated(api, 0)
            assert api.http.post(api.path("/checkpoints")).json()["step"] == 1
            (lost,) = [shard["index"] for shard in api.shards if shard["url"] == processes[1].url]
            with waiting(api, redis, 1) as last:
                part = distances(api, 1, lost)
                if reports:
                    processes[1].send_signal(signal.SIGSTOP)
                else:
                    processes[1].kill()
            wait_until(lambda: redis.hkeys(api.redis_key("distances")) == [str(1 - lost)])
            if reports:
                report(redis, api, lost, part)
                wait_until(lambda: applied(api, 1 - lost) == 2)
                processes[1].kill()
            # By its URL it takes its shard back long before its ownership has ended.
            processes[1].start()
            wait_until(lambda: api.status()["epoch"] == 2 and not api.http.get(api.path("/topology")).json()["missing"])
            with pytest.raises(httpx.TransportError):
                last.result()
            assert_at(api, 1)
            for update in (1, 2):
                updated(api, update)
                assert_at(api, update + 1)


def applied(api: ShardedApi, shard: int) -> int:
    """The step that a shard has reached."""
    return int(api.http.get(api.path("/topology")).json()["shards"][shard]["applied_step"])


def report(redis: Redis, api: ShardedApi, shard: int, part: Tensor) -> None:
    """Reports a shard's part of the newest update in the name of its owner."""
    token = str(redis.hget(api.redis_key("shards"), f"{shard}:token"))
    position = LogPosition(1, int(str(redis.hget(api.redis_key("run"), "seq"))))

    async def call() -> None:
        made = await Store.connect(f"unix://{redis.connection_pool.connection_kwargs['path']}")
        log = Coordinator(made, api.run, "{}", Policy("1", "none", distinct=False)).log
        assert await log.report_distances(Owner(shard, token, position), position.seq, part) is not None
        await made.close()

    asyncio.run(call())
