"""Server-sent events, read; and the command that shows them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import forked
from freestep import Run
from freestep.api.events import event_of
from freestep.commands.events import told
from freestep.event_source import Message, messages
from harness import ThreadService

SPEC = {"optimizer": {"algorithm": "sgd", "lr": 1.0}, "parameters": [{"name": "w", "shape": [2]}]}


def test_messages_are_those_of_the_standard() -> None:
    lines = ["retry: 250", "", ": ping", "", "event: push", "id: 1-2", "data: {", "data:}", "", "data: cut off"]
    assert list(messages(lines)) == [Message(retry=0.25), Message("{\n}")]
    assert list(messages(["retry: soon", "", "event: push", ""])) == []


def test_events_are_shown(run: Run, service: ThreadService) -> None:
    run.create(SPEC)
    run.initialize({"w": torch.zeros(2)})
    with run.lease("worker-1") as lease:
        for step in range(3):
            run.push({"w": torch.ones(2)}, lease.claim(step, loss=0.25))
    run.report("accuracy", 0.5, 3)
    shown = forked.freestep("events", run.name, FREESTEP_URL=service.url)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert any("lease" in line and "granted to worker-1" in line for line in lines)
    assert any("1-2" in line and "applied of worker-1, staleness 0, loss 0.25" in line for line in lines)
    assert any("accuracy 0.5 at step 3" in line for line in lines)
    shown = forked.freestep("events", run.name, "--from", "3", "--json", FREESTEP_URL=service.url)
    found = [json.loads(line) for line in shown.stdout.splitlines()]
    assert {event["step"] for event in found} == {3}
    shown = forked.freestep("events", run.name, "--after", found[0]["id"], "--json", FREESTEP_URL=service.url)
    assert [json.loads(line) for line in shown.stdout.splitlines()] == found[1:]


@pytest.mark.parametrize("place", ["yesterday", "gestern früh", "", "1-2\n"])
def test_a_place_that_is_none_is_refused(run: Run, service: ThreadService, place: str) -> None:
    run.create(SPEC)
    shown = forked.freestep("events", run.name, "--after", place, FREESTEP_URL=service.url)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert "--after" in shown.stderr and "Last-Event-ID" not in shown.stderr


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"kind": "epoch"}, "the run goes on in epoch 2 at step 7"),
        ({"kind": "update"}, "made without a push: a lease has ended that it waited for"),
        (
            {"kind": "gap", "after": "1-2", "entries": 3},
            "the service keeps those behind 1-2 no more: 3 entries of the log are missing here",
        ),
        (
            {"kind": "gap", "after": None, "entries": None},
            "the service keeps the oldest no more: some entries of the log are missing here",
        ),
        (
            {"kind": "gap", "after": "1-2", "entries": 0},
            "the service keeps those behind 1-2 no more: no entries of the log are missing here",
        ),
    ],
)
def test_every_event_tells_what_it_is(event: dict[str, Any], text: str) -> None:
    assert told(event_of({"id": "2-9", "epoch": 2, "step": 7, **event})) == text


def test_two_places_to_begin_at_are_used_wrongly(service: ThreadService) -> None:
    shown = forked.freestep("events", "none", "--after", "1-2", "--from", "3", FREESTEP_URL=service.url)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "give one of them" in shown.stderr
