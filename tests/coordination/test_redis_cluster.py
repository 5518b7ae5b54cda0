"""A Redis Cluster of several servers: runs on each, slots that move, and servers that are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.crc import key_slot

from coordination.servers import push_once, push_until_decided, refusal, valkey_server
from harness import ThreadService
from meanwhile import Call, under_way, wait_until
from plain_calls import Api, ShardedApi, persistently, slug
from ports import free_port
from shards.runs import ONES, ZEROS, counting

pytestmark = pytest.mark.slow

SLOTS = 16384


class Server:
    """A server in cluster mode, which can be killed."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._life = stack.enter_context(ExitStack())
        self.bus = free_port()
        flags = ("--cluster-enabled", "yes", "--cluster-port", str(self.bus), "--cluster-node-timeout", "5000")
        flags += ("--cluster-require-full-coverage", "no", "--repl-diskless-sync-delay", "0")
        self.port = self._life.enter_context(valkey_server(folder, *flags))
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = self._life.enter_context(Redis(port=self.port, decode_responses=True))
        self.id = self.do("MYID")

    def do(self, *command: str | int) -> Any:
        """A command of CLUSTER."""
        return self.client.execute_command("CLUSTER", *command)

    def knows(self, count: int) -> bool:
        """Whether it sees so many servers, and a cluster that works."""
        info: Any = self.client.cluster("INFO")
        return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(count)

    def sees_replica(self) -> bool:
        """Whether it knows which server is a replica."""
        return any("slave" in each["flags"] for each in self.client.cluster("NODES").values())

    def kill(self) -> None:
        self._life.close()


class Cluster:
    """Three primaries, each with a third of the slots, and a replica of the first."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.servers = [Server(folder / f"server-{number}", stack) for number in range(4)]
        *primaries, self.replica = self.servers
        self.primaries = primaries
        for number, server in enumerate(primaries):
            first, last = SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1
            server.do("ADDSLOTSRANGE", first, last)
        for server in self.servers[1:]:
            server.do("MEET", "127.0.0.1", primaries[0].port, primaries[0].bus)
        wait_until(lambda: all(server.knows(4) for server in self.servers))
        self.replica.do("REPLICATE", primaries[0].id)
        wait_until(lambda: self.replica.client.info("replication")["master_link_status"] == "up")
        wait_until(lambda: all(server.knows(4) and server.sees_replica() for server in self.servers))

    def number_of(self, slot: int) -> int:
        """Which primary had a slot at first."""
        return next(number for number in range(3) if slot < SLOTS * (number + 1) // 3)

    def run_on(self, number: int) -> str:
        """A name of a run whose keys are on that primary at first."""
        names = (f"run-{tail}" for tail in range(SLOTS))
        return next(name for name in names if self.number_of(key_slot(name.encode())) == number)

    def move(self, slot: int, source: Server, target: Server) -> Iterator[None]:
        """Moves a slot, with a pause before each step."""
        target.do("SETSLOT", slot, "IMPORTING", source.id)
        source.do("SETSLOT", slot, "MIGRATING", target.id)
        yield
        while keys := source.do("GETKEYSINSLOT", slot, 3):
            source.client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 10_000, "KEYS", *keys)
            yield
        for server in (target, *self.primaries):
            server.do("SETSLOT", slot, "NODE", target.id)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


@pytest.fixture
def nodes(cluster: Cluster, start_service: Callable[..., ThreadService], tmp_path: Path) -> list[ThreadService]:
    """Two services, which name a server each."""
    shared = {"checkpoint_url": str(tmp_path / "checkpoints"), "owner_ttl_seconds": 60.0}
    return [
        start_service(tmp_path / f"node-{number}", redis_url=cluster.primaries[number].url, **shared)
        for number in range(2)
    ]


def push(api: ShardedApi, lease: dict[str, Any], step: int) -> None:
    receipts = push_until_decided(api, lease, step, f"key-{step}", ONES)
    assert {receipt["step"] for receipt in receipts} == {step + 1}


def assert_counted(api: Api, pushes: int) -> None:
    answer = persistently(lambda: api.http.get(api.path()))
    assert (answer.json()["step"], answer.json()["epoch"]) == (pushes, 1)
    tensors, _ = api.pull("y")
    assert all(tensors[name].equal(-pushes * ONES[name]) for name in ONES)


@pytest.fixture
def sharded(cluster: Cluster, nodes: list[ThreadService], request: pytest.FixtureRequest) -> ShardedApi:
    """A run of three shards on the first primary."""
    api = ShardedApi(nodes[0].url, cluster.run_on(0))
    request.addfinalizer(api.http.close)
    api.create(**counting(), tensors=ZEROS)
    return api


def test_runs_are_on_all_servers(cluster: Cluster, nodes: list[ThreadService], connect: Callable[..., Api]) -> None:
    for number in range(3):
        api = ShardedApi(nodes[number % 2].url, cluster.run_on(number))
        api.create(**counting(), tensors=ZEROS)
        lease = api.lease(ttl_ms=600_000)
        for step in range(3):
            push(api, lease, step)
        assert_counted(api, 3)
        assert api.http.post(api.path("/metrics"), json={"name": "loss", "value": 1.0, "step": 3}).status_code == 200
        assert api.http.post(api.path("/checkpoints")).status_code in (200, 201)
        keys = {key for server in cluster.primaries for key in server.client.keys(f"freestep:{{{api.run}}}:*")}
        assert keys == set(cluster.primaries[number].client.keys(f"freestep:{{{api.run}}}:*")) != set()
        assert api.http.delete(api.path()).status_code == 204
        api.http.close()
    for node in nodes:
        assert connect(node.url).http.get("/readyz").status_code == 200


def test_a_server_that_evicts_is_found_among_the_others(
    cluster: Cluster, nodes: list[ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    api = push_once(nodes[0], connect)
    cluster.primaries[2].client.config_set("maxmemory-policy", "allkeys-lru")
    told = "set its maxmemory-policy to noeviction, it is allkeys-lru"
    assert told in refusal(cluster.primaries[0].url, tmp_path)
    wait_until(lambda: api.http.get("/readyz").status_code == 503)
    assert told in api.http.get("/readyz").json()["detail"]


def test_a_slot_that_moves(cluster: Cluster, sharded: ShardedApi) -> None:
    """While keys of a run are on both servers, scripts are refused (TRYAGAIN), and pushes wait."""
    lease = sharded.lease(ttl_ms=600_000)
    push(sharded, lease, 0)
    meanwhile: Call[None] | None = None
    for _ in cluster.move(key_slot(sharded.run.encode()), cluster.primaries[0], cluster.primaries[1]):
        if meanwhile is None:
            meanwhile = under_way(lambda: push(sharded, lease, 1))
            refused = sharded.http.get(sharded.path("/data"))
            assert slug(refused) == "coordinator-unavailable"
            assert "the Redis Cluster cannot be used, as while a slot is moved" in refused.json()["detail"]
    assert meanwhile is not None
    meanwhile.result()
    for step in range(2, 6):
        push(sharded, lease, step)
    assert_counted(sharded, 6)
    assert cluster.primaries[1].client.exists(sharded.redis_key("run"))


def test_a_primary_that_is_lost(cluster: Cluster, sharded: ShardedApi, nodes: list[ThreadService]) -> None:
    """The one with the run's keys, which a service has named too."""
    lease = sharded.lease(ttl_ms=600_000)
    for step in range(3):
        push(sharded, lease, step)
    cluster.primaries[0].kill()
    cluster.replica.do("FAILOVER", "TAKEOVER")
    for step in range(3, 6):
        push(sharded, lease, step)
    assert_counted(sharded, 6)
    assert cluster.replica.client.hget(sharded.redis_key("run"), "step") == "6"
    for node in nodes:
        wait_until(lambda node=node: sharded.http.get(f"{node.url}/readyz").status_code == 200)  # type: ignore[misc]
