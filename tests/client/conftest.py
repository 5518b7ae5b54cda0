"""A run that optimizers make, and an onlooker's view of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from freestep import Client
from freestep.client import Run
from harness import ThreadService


@pytest.fixture
def name() -> str:
    """Of a run that there is not yet."""
    return f"run-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def run(service: ThreadService, name: str) -> Iterator[Run]:
    """The run, as an onlooker sees it."""
    with Client(service.url) as client:
        yield client.run(name)
