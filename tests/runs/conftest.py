"""Stores of the tests' own, and services that claim a place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness import store as own_store
from runs.claim_scene import Scene, two_stores


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """A store of the test's own, by its URL."""
    with own_store("valkey", tmp_path) as url:
        yield url


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """Services on a place of the kind that a test names."""
    with ExitStack() as stack:
        (tmp_path / "data").mkdir()
        yield Scene(request.param, tmp_path / "data", two_stores(stack, tmp_path))
