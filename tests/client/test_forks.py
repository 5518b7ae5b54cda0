"""Processes forked from one that uses a client: each gets its own answers, and none ends what is the parent's."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch

from forked import Script
from freestep import Client
from harness import ThreadService

FORKING = Path(__file__).with_name("forking.py")


def test_children_that_share_a_client_get_their_own_answers(service: ThreadService) -> None:
    names = [f"forked-{number}-{uuid.uuid4().hex[:8]}" for number in range(4)]
    spec = {"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [200_000]}]}
    with Client(service.url) as client:
        for number, name in enumerate(names):
            client.run(name).create(spec)
            client.run(name).initialize({"w": torch.full((200_000,), float(number))})
        with Script(FORKING, service.url, *names) as script:
            lines = [script.read_line() for _ in range(len(names) + 2)]
            assert script.wait() == 0
    parent, *children, worker = lines
    assert parent == repr(("parent", {3.0}))
    assert children == [repr((number, {float(number)}, True)) for number in range(len(names))]
    # Its lease was not released by the children.
    assert worker == "parent"
