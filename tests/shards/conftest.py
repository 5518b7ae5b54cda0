"""Services that share their runs, and a run with a shard on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from harness import ThreadService
from plain_calls import ShardedApi
from shards.runs import SHARDS, ZEROS, counting, sharded


@pytest.fixture(scope="module")
def stall_seconds() -> float:
    """The services' setting of this name; modules that wait for it make it short."""
    return 30.0


@pytest.fixture(scope="module")
def nodes(shared_nodes: Callable[..., list[ThreadService]], stall_seconds: float) -> list[ThreadService]:
    """As many services as the runs have shards."""
    return shared_nodes(SHARDS, stall_seconds=stall_seconds)


@pytest.fixture
def run(nodes: list[ThreadService]) -> Iterator[ShardedApi]:
    """A run whose parameters are 0, and from which every gradient is subtracted."""
    with sharded(nodes) as api:
        api.create(**counting(durability="none"), tensors=ZEROS)
        yield api


@pytest.fixture
def redis(nodes: list[ThreadService]) -> Iterator[Redis]:
    with nodes[0].redis() as client:
        yield client
