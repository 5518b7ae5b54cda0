"""The libraries under test work offline; services and runs are those of all tests."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from freestep import Client, Run
from harness import ThreadService

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def name() -> str:
    """Of a run that there is not yet."""
    return f"run-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def run(service: ThreadService, name: str) -> Iterator[Run]:
    """The run, as an onlooker sees it."""
    with Client(service.url) as client:
        yield client.run(name)
