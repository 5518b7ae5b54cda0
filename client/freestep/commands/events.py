"""`freestep events`: what happens to a run, as it happens."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from freestep.api.events import (
    CheckpointEvent,
    ControlEvent,
    DataEvent,
    EpochEvent,
    GapEvent,
    LeaseEvent,
    MetricEvent,
    PushEvent,
    RunEvent,
    ShardsEvent,
    UpdateEvent,
)
from freestep.client import DEFAULT_URL
from freestep.commands.shared import Json, RunName, Token, Url, connect, fail
from freestep.errors import MalformedRequest
from freestep.terminal import print_line

__all__ = ["events", "told"]


def events(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is yet to happen.")] = False,
    from_step: Annotated[
        int | None, typer.Option("--from", min=0, help="Begin with this step of the newest epoch.")
    ] = None,
    after: Annotated[str | None, typer.Option(help="Begin behind the event with this id.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what has happened to a run, as far as its service still knows: one event a line.

    Lines of JSON with --json; an event's `id` is its place, from which --after goes on.
    """
    if after is not None and from_step is not None:
        fail(2, "--after and --from both say where to begin: give one of them")
    with connect(url, token, patient=follow) as client:
        try:
            for event in client.run(run).events(after, from_step=from_step, follow=follow):
                if as_json:
                    sys.stdout.write(event.model_dump_json() + "\n")
                    sys.stdout.flush()
                else:
                    print_line(f"{event.id:<12} step {event.step:<8} {event.kind:<10} {told(event)}".rstrip())
        except MalformedRequest as error:
            # The header is what the option is sent in.
            fail(1, str(error).replace("Last-Event-ID", "--after"))


def told(event: RunEvent) -> str:
    """What an event tells beside its step."""
    match event:
        case PushEvent():
            words = [f"{event.decision} of {event.worker}", f"staleness {event.staleness}"]
            words += [event.reason] if event.reason else []
            words += [f"loss {event.loss:.4g}"] if event.loss is not None else []
            words += [f"for {event.coalesced} pushes"] if event.coalesced > 1 else []
            return ", ".join(words)
        case MetricEvent():
            return f"{event.name} {event.value:.4g} at step {event.measured_at}"
        case DataEvent():
            return event.name
        case LeaseEvent():
            return (
                f"{event.change} to {event.worker}"
                if event.change == "granted"
                else f"{event.change} of {event.worker}"
            )
        case ControlEvent():
            return f"{json.dumps(event.changes)} by {event.by or 'nobody known'}"
        case CheckpointEvent():
            return f"of step {event.written_step}, epoch {event.written_epoch}"
        case ShardsEvent():
            return f"{event.shards}: {', '.join(owner or 'no owner' for owner in event.owners)}"
        case GapEvent():
            count = "some" if event.entries is None else event.entries or "no"
            after = f"those behind {event.after}" if event.after else "the oldest"
            return f"the service keeps {after} no more: {count} entries of the log are missing here"
        case EpochEvent():
            return f"the run goes on in epoch {event.epoch} at step {event.step}"
        case UpdateEvent():
            return "made without a push: a lease has ended that it waited for"
    return ""
