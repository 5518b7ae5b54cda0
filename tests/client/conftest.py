"""Optimizers that make a run; servers that answer as they are told, and who asks them;
a region's run and its parent's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from beside_package import Home
from freestep import LocalSteps, Region, RemoteOptimizer, Run
from freestep.bulk import BulkTransport
from harness import ThreadService
from region_sides import WHOLE, sides
from scripted import Script, Server
from trained import ADAMW


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers that follow scripts; what failed in those fails the test."""
    made: list[Server] = []

    def start(*scripts: Script, **options: Any) -> Server:
        made.append(Server(*scripts, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """Who asks them, through the transport of large bodies."""
    with httpx.Client(transport=BulkTransport(), timeout=30) as client:
        yield client


@pytest.fixture
def locally(service: ThreadService, name: str) -> Iterator[Callable[..., LocalSteps]]:
    """Makes optimizers of one run, over AdamW unless another is given; they are closed with the test."""
    made: list[LocalSteps] = []

    def optimizer(model: Any, inner: torch.optim.Optimizer | None = None, **options: Any) -> LocalSteps:
        given = {"run": name, "every": 5, "aggregation": "async", **options}
        inner = inner or torch.optim.AdamW(model.parameters(), **ADAMW)
        made.append(LocalSteps(model, inner, **(given if "client" in given else {"url": service.url, **given})))
        return made[-1]

    yield optimizer
    for each in made:
        each.close()


@contextmanager
def optimizers(url: str, name: str) -> Iterator[Callable[..., RemoteOptimizer]]:
    """Makes optimizers of one run, which are closed when the block ends."""
    made: list[RemoteOptimizer] = []

    def optimizer(params: Any, **options: Any) -> RemoteOptimizer:
        given = {"run": name, **options}
        made.append(RemoteOptimizer(params, **(given if "client" in given else {"url": url, **given})))
        return made[-1]

    yield optimizer
    for each in made:
        each.close()


@pytest.fixture
def make(service: ThreadService, name: str) -> Iterator[Callable[..., RemoteOptimizer]]:
    """Makes optimizers of one run; they are closed with the test."""
    with optimizers(service.url, name) as made:
        yield made


@pytest.fixture
def remotely(service: ThreadService, name: str) -> Iterator[Callable[..., RemoteOptimizer]]:
    """Makes optimizers of one run that takes every gradient off its parameters; they are closed with the test."""
    with optimizers(service.url, name) as made:
        yield partial(made, algorithm="sgd", lr=1.0, aggregation="async")


@pytest.fixture(params=["local", "service"])
def home(request: pytest.FixtureRequest, name: str) -> Iterator[Home]:
    """Makes optimizers with a run each, in the process and on a service; they are closed with the test."""
    url = "local" if request.param == "local" else request.getfixturevalue("service").url
    made = Home(url, name)
    yield made
    made.close()


@pytest.fixture
def here_and_far(service: ThreadService, name: str) -> Iterator[tuple[Run, Run]]:
    with sides(service.url, name) as both:
        yield both


@pytest.fixture
def here(here_and_far: tuple[Run, Run]) -> Run:
    return here_and_far[0]


@pytest.fixture
def far(here_and_far: tuple[Run, Run]) -> Run:
    return here_and_far[1]


@pytest.fixture
def region(here_and_far: tuple[Run, Run], tmp_path: Path) -> Iterator[Callable[..., Region]]:
    """Makes regions of the two runs, one after another over the same file; they are closed with the test."""
    made: list[Region] = []

    def make(**options: Any) -> Region:
        given = {"every": 2, "optimizer": WHOLE, "aggregation": {"policy": "async"}, **options}
        made.append(Region(*here_and_far, tmp_path / "place", **given))
        return made[-1]

    yield make
    for each in made:
        each.close()
