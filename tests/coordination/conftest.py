"""Runs in a Redis that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from coordination.driven import DrivenRun, Driver


@pytest.fixture(scope="module")
def driver(valkey_url: str) -> Iterator[Driver]:
    made = Driver(valkey_url)
    yield made
    made.close()


@pytest.fixture
def make_run(driver: Driver) -> Callable[..., DrivenRun]:
    """Makes runs that nobody else has; they are not created in Redis yet."""

    def make(shards: int = 1, **options: object) -> DrivenRun:
        return DrivenRun(driver, shards, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(params=[1, 3])
def run(request: pytest.FixtureRequest, driver: Driver) -> DrivenRun:
    """A run of one shard, or of three, that is open and has its weights."""
    return DrivenRun(driver, request.param).open()
