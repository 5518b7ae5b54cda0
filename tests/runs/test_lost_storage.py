"""What a service says when its storage, its Redis or its descriptors fail while it runs, or before it starts."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from harness import ProcessService, ThreadService
from harness import store as started
from in_process import Medium, claim_of, lease_of, new_run, process, pull, push, run_async, until
from meanwhile import wait_until
from plain_calls import Api, slug

HERE = {"advertise_url": "http://127.0.0.1:1"}
"""The same URL after a restart."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """A store of the test's own, that outlives services."""
    with started("valkey", tmp_path) as url:
        yield url


@pytest.mark.parametrize("ends", ["in order", "killed"])
def test_a_run_whose_files_are_lost_is_named(
    start_service: Callable[..., ThreadService],
    start_process: Callable[..., ProcessService],
    connect: Callable[..., Api],
    redis: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ends: str,
) -> None:
    first = (start_process if ends == "killed" else start_service)(tmp_path / "data", redis_url=redis, **HERE)
    api = connect(first.url)
    api.create()
    api.push(api.lease(), 0)
    if isinstance(first, ProcessService):
        first.kill()
    else:
        first.stop()
    shutil.move(tmp_path / "data" / "runs", tmp_path / "runs")
    second = start_service(tmp_path / "data", ready=503, redis_url=redis, owner_ttl_seconds=1.0, **HERE)
    api = connect(second.url, api.run)
    ready = api.http.get("/readyz")
    assert (ready.status_code, slug(ready)) == (503, "shard-unavailable")
    reason = f"shard 0 has no owner: the storage {tmp_path / 'data'} holds no checkpoint of it, though there was one"
    assert ready.json()["detail"].startswith(f"run {api.run}: {reason}")
    assert reason in ready.json()["problems"][api.run]
    assert caplog.text.count(reason) == 1
    refused = api.http.post(api.path("/leases"), json={"worker": "w"})
    assert (refused.status_code, slug(refused)) == (503, "shard-unavailable")
    assert "holds no checkpoint of it" in refused.json()["detail"]
    # It goes on as soon as the files are back.
    shutil.move(tmp_path / "runs", tmp_path / "data" / "runs")
    wait_until(lambda: api.http.get(api.path("/parameters")).status_code == 200)
    assert api.http.get("/readyz").json()["problems"] == {}
    assert api.status()["step"] == (1 if ends == "in order" else 0)
    api.http.delete(api.path())


def test_a_lost_run_can_be_deleted(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis: str, tmp_path: Path
) -> None:
    first = start_service(tmp_path / "data", redis_url=redis, **HERE)
    api = connect(first.url)
    api.create()
    first.stop()
    shutil.rmtree(tmp_path / "data")
    second = start_service(tmp_path / "data", ready=503, redis_url=redis, **HERE)
    api = connect(second.url, api.run)
    assert api.http.delete(api.path()).status_code == 204
    assert api.http.get("/readyz").status_code == 200
    assert api.create().json()["epoch"] == 2
    api.http.delete(api.path())


def test_what_another_service_has_is_waited_for(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis: str, tmp_path: Path
) -> None:
    """A service with a disk of its own is ready before the one that has the run's."""
    first = start_service(tmp_path / "first", redis_url=redis)
    api = connect(first.url)
    api.create()
    api.push(api.lease(), 0)
    first.stop()
    second = start_service(tmp_path / "second", redis_url=redis, owner_ttl_seconds=1.0)
    api = connect(second.url, api.run)
    wait_until(lambda: api.run in api.http.get("/readyz").json()["problems"])
    assert "holds no checkpoint" in api.http.get("/readyz").json()["problems"][api.run]
    api = connect(start_service(tmp_path / "first", redis_url=redis).url, api.run)
    wait_until(lambda: api.http.get(api.path("/parameters")).status_code == 200)
    wait_until(lambda: connect(second.url).http.get("/readyz").json()["problems"] == {})
    api.http.delete(api.path())


def test_checkpoints_that_cannot_be_read_at_the_start_are_read_later(redis: str, tmp_path: Path) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "data")
        async with process(redis, tmp_path / "data", storage=medium) as registry:
            await push(run := await new_run(registry), claim_of(await lease_of(run), "one"))
        medium.fails = "/checkpoints"
        async with process(redis, tmp_path / "data", storage=medium, owner_ttl_seconds=1.0) as registry:
            await until(lambda: "Input/output error" in registry.problems.get("run", ""), "the problem")
            medium.fails = None
            await until(lambda: not registry.problems, "the end of the problem")
            await lease_of(await registry.find("run"))
            assert await pull(registry.get("run").shard(0)) == (1, 1.0)

    run_async(work)


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_a_redis_that_became_a_replica_takes_no_writes(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path, kind: str
) -> None:
    with started(kind, tmp_path) as url:
        api = connect(start_service(redis_url=url, commit_seconds=0.5).url)
        api.create()
        lease = api.lease()
        with Redis.from_url(url) as client:
            client.replicaof("127.0.0.1", 1)
            answers = [
                api.http.get("/readyz"),
                api.push(lease, 0),
                api.http.post(api.path("/leases"), json={"worker": "w"}),
                api.http.put("/v1/runs/other", json=api.spec()),
            ]
            assert [(each.status_code, slug(each)) for each in answers] == [(503, "coordinator-unavailable")] * 4
            assert "read only replica" in answers[0].json()["detail"]
            # What is here can be read.
            assert api.http.get(api.path("/parameters")).status_code == 200
            client.replicaof("NO", "ONE")
        wait_until(lambda: api.http.get("/readyz").status_code == 200)
        assert api.push(lease, 0).status_code == 200


def test_without_descriptors_a_checkpoint_is_refused(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process()
    api = connect(service.url)
    api.create()
    api.push(api.lease(), 0)
    assert service.process is not None and service.process.pid is not None
    pid = service.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert soft == min(hard, 65_536)
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    lowest_free = min(set(range(len(taken) + 1)) - taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, hard))
    refused = api.http.post(api.path("/checkpoints"))
    assert (refused.status_code, slug(refused)) == (507, "storage-unavailable")
    assert "Too many open files" in refused.json()["detail"]
    assert "Too many open files" in api.http.get("/readyz").json()["problems"][api.run]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    assert api.http.get("/readyz").json()["problems"] == {}
