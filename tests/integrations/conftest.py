"""The libraries under test work offline; services and runs are those of all tests."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from freestep import Client, RemoteOptimizer, Run
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


@pytest.fixture
def make_module(service: ThreadService, name: str) -> Iterator[Callable[..., Any]]:
    """Makes LightningModules whose optimizers work on one run; these are closed with the test."""
    # Takes seconds to import.
    from lightning_module import Module

    made: list[RemoteOptimizer] = []

    def module(kind: type[Module] = Module, seed: int = 0, **options: Any) -> Module:
        def optimizer(model: torch.nn.Module) -> RemoteOptimizer:
            made.append(RemoteOptimizer(model, url=service.url, run=name, **{"aggregation": "async", **options}))
            return made[-1]

        return kind(optimizer, seed)

    yield module
    for each in made:
        each.close()
