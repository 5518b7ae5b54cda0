"""Processes forked from one that uses a client: each gets its own answers, and none ends what is the parent's."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from forked import Script
from freestep import Client
from harness import ThreadService
from proxies import Cutter

FORKING = Path(__file__).with_name("forking.py")


@pytest.fixture(params=["directly", "through a proxy"])
def environment(request: pytest.FixtureRequest, service: ThreadService) -> Iterator[dict[str, str]]:
    """How the script reaches the service."""
    if request.param == "directly":
        yield {"NO_PROXY": "127.0.0.1"}
        return
    with Cutter(service.url, []) as cutter:
        # A server understands the targets that a proxy is sent.
        yield {"http_proxy": cutter.url, "no_proxy": "", "NO_PROXY": ""}


def test_children_that_share_a_client_get_their_own_answers(
    service: ThreadService, environment: dict[str, str]
) -> None:
    names = [f"forked-{number}-{uuid.uuid4().hex[:8]}" for number in range(4)]
    spec = {"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [200_000]}]}
    with Client(service.url) as client:
        for number, name in enumerate(names):
            client.run(name).create(spec)
            client.run(name).initialize({"w": torch.full((200_000,), float(number))})
        with Script(FORKING, service.url, *names, **environment) as script:
            lines = [script.read_line() for _ in range(len(names) + 2)]
            assert script.wait() == 0
    parent, *children, worker = lines
    assert parent == repr(("parent", {3.0}))
    assert children == [repr((number, {float(number)}, True)) for number in range(len(names))]
    # Its lease was not released by the children.
    assert worker == "parent"
