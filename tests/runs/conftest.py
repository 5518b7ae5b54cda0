"""Stores of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import store as own_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """A store of the test's own, by its URL."""
    with own_store("valkey", tmp_path) as url:
        yield url
