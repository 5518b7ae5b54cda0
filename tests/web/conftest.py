"""Memory that a client shares with a service, for the tests of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from harness import ThreadService
from plain_calls import Api
from shared_bodies import Handed, fetch


@pytest.fixture
def share(api: Api) -> Iterator[Callable[..., Handed]]:
    """Memory for a new lease of a run that has its weights."""
    with ExitStack() as stack:

        def make(worker: str = "worker", **sizes: int) -> Handed:
            if api.http.get(api.path()).status_code == 404:
                api.create()
            made = fetch(api, api.lease(worker), **sizes)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def watched_service(start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch) -> ThreadService:
    """A service that often looks whether leases have ended."""
    monkeypatch.setattr("freestep_service.web.memories._LOOK_S", 0.02)
    return start_service()


@pytest.fixture
def watched(watched_service: ThreadService) -> Iterator[Api]:
    """A run of it."""
    api = Api(watched_service.url)
    api.create()
    yield api
    api.http.close()
