"""A failover to a replica that lags: what was acknowledged in the lag counts once, and runs go on in their epochs."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from redis import Redis

from chaos.relay import Relay
from coordination.servers import push_until_decided, valkey_server
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from plain_calls import SGD, Api, ShardedApi, persistently, slug

pytestmark = pytest.mark.slow

PUSHES = 12
"""Each moves a coordinate of its own from 0 to 1."""


class Pair:
    """A primary, its replica, and an address that leads to either.

    A second relay carries what is replicated, and can hold it back.
    """

    def __init__(self, primary: int, replica: int) -> None:
        self._replica = replica
        self.address = Relay(primary)
        self._link = Relay(primary)
        self.url = f"redis://127.0.0.1:{self.address.port}"
        with self.redis() as client:
            client.replicaof("127.0.0.1", str(self._link.port))
            wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        self._primary = primary

    def redis(self) -> Redis:
        """A client of the replica."""
        return Redis(port=self._replica, decode_responses=True)

    def lag(self) -> None:
        """The replica has all that there is now, and gets nothing more."""
        with Redis(port=self._primary) as client:
            # Of what a client wrote itself.
            client.set("freestep:writable", "", px=1)
            assert client.wait(1, 30_000) == 1
        self._link.hold()

    def fail_over(self) -> None:
        """The replica is promoted as it is, and the address leads there."""
        with self.redis() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
        self.address.target = self._replica
        self.address.cut()

    def close(self) -> None:
        self.address.close()
        self._link.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    flags = ("--repl-diskless-sync-delay", "0", "--repl-timeout", "3600")
    with valkey_server(tmp_path / "primary", *flags) as primary, valkey_server(tmp_path / "replica", *flags) as replica:
        made = Pair(primary, replica)
        yield made
        made.close()


def spec(durability: str) -> dict[str, Any]:
    parameters = [{"name": "w", "shape": [PUSHES]}]
    return {"optimizer": SGD, "parameters": parameters, "durability": durability, "aggregation": {"policy": "async"}}


def gradient(number: int) -> dict[str, torch.Tensor]:
    return {"w": -torch.nn.functional.one_hot(torch.tensor(number), PUSHES).float()}


def assert_counted(api: Api, numbers: range) -> None:
    """The weights have just these pushes, each once, and the run is in its first epoch."""
    expected = sum((-gradient(number)["w"] for number in numbers), torch.zeros(PUSHES))
    # A connection may be found cut by any call.
    answer = persistently(lambda: api.http.get(api.path("/parameters"), params={"point": "y"}))
    found = safetensors.torch.load(answer.content)["w"].tolist()
    assert (found, answer.headers["Freestep-Step"]) == (expected.tolist(), str(len(numbers)))
    assert persistently(lambda: api.http.get(api.path())).json()["epoch"] == 1


def push(api: Api, lease: dict[str, Any], number: int) -> dict[str, Any]:
    answer = persistently(lambda: api.push(lease, number, f"key-{number}", tensors=gradient(number)))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@contextmanager
def service_of(pair: Pair, folder: Path, *, is_killed: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The URL of a service, and what happens to it at the failover."""
    settings: dict[str, Any] = {"redis_url": pair.url, "owner_ttl_seconds": 2.0}
    if not is_killed:
        service = ThreadService(folder, **settings)
        yield service.url, lambda: None
        service.stop()
        return
    process = ProcessService(folder, **settings)

    def crash() -> None:
        process.kill()
        pair.fail_over()
        process.start()

    yield process.url, crash
    process.stop()


@pytest.mark.parametrize(
    ("durability", "is_killed"), [("checkpoint", False), ("journal", False), ("journal", True)],
    ids=["checkpoint", "journal", "journal, and the service is killed"],
)  # fmt: skip
def test_what_was_acknowledged_in_the_lag_counts_once(
    pair: Pair, connect: Callable[..., Api], tmp_path: Path, durability: str, is_killed: bool
) -> None:
    with service_of(pair, tmp_path / "data", is_killed=is_killed) as (url, crash):
        api = connect(url)
        assert api.http.put(api.path(), json=api.spec(**spec(durability))).status_code == 201
        assert api.initialize({"w": torch.zeros(PUSHES)}).status_code == 201
        older = api.lease("worker", ttl_ms=600_000)
        receipts = [push(api, older, number) for number in range(3)]
        pair.lag()
        newer = api.lease("worker", ttl_ms=600_000)
        receipts += [push(api, newer, number) for number in range(3, 8)]
        crash() if is_killed else pair.fail_over()
        for number, lease in [(number, older if number < 3 else newer) for number in range(8)]:
            assert push(api, lease, number) == receipts[number] | {"replayed": True}
        assert_counted(api, range(8))
        # The lease that was granted in the lag is lost, and the one before it good again,
        refused = persistently(lambda: api.push(newer, 8, "key-8", tensors=gradient(8)))
        assert slug(refused) == "lease-expired"
        assert push(api, older, 8)["decision"] == "applied"
        # until the worker asks once more.
        newest = persistently(lambda: api.http.post(api.path("/leases"), json={"worker": "worker"})).json()
        assert newest["token"] > newer["token"] > older["token"]
        refused = api.push(older, 9, "key-9", tensors=gradient(9))
        assert slug(refused) == "lease-expired"
        for number in range(9, PUSHES):
            assert push(api, newest, number)["decision"] == "applied"
        assert_counted(api, range(PUSHES))
        with pair.redis() as client:
            assert client.hget(api.redis_key("run"), "step") == str(PUSHES)


@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_so_does_what_several_shards_acknowledged(
    pair: Pair,
    start_service: Callable[..., ThreadService],
    tmp_path: Path,
    durability: str,
    request: pytest.FixtureRequest,
) -> None:
    shared = {"redis_url": pair.url, "checkpoint_url": str(tmp_path / "checkpoints"), "owner_ttl_seconds": 60.0}
    services = [start_service(tmp_path / f"node-{number}", **shared) for number in range(2)]
    api = ShardedApi(services[0].url, f"run-{uuid.uuid4().hex}")
    request.addfinalizer(api.http.close)
    api.create(tensors={"w": torch.zeros(PUSHES)}, **spec(durability), shards=3)
    assert {each["url"] for each in api.shards} == {service.url for service in services}

    def push_parts(lease: dict[str, Any], number: int) -> list[dict[str, Any]]:
        return push_until_decided(api, lease, number, f"key-{number}", gradient(number))

    lease = api.lease("worker", ttl_ms=600_000)
    receipts = [push_parts(lease, number) for number in range(3)]
    pair.lag()
    receipts += [push_parts(lease, number) for number in range(3, 8)]
    pair.fail_over()
    for number in range(8):
        again = push_parts(lease, number)
        assert [each["step"] for each in again] == [each["step"] for each in receipts[number]]
        assert all(each["replayed"] for each in again)
    assert_counted(api, range(8))
    for number in range(8, PUSHES):
        assert {each["decision"] for each in push_parts(lease, number)} == {"applied"}
    assert_counted(api, range(PUSHES))
