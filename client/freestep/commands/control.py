"""`freestep set`, `pause`, `resume` and `end-worker`: a run is steered while it trains."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from freestep.api.control import LONGEST_BAN_S
from freestep.api.models import RunStatus
from freestep.client import DEFAULT_URL
from freestep.commands.facts import facts
from freestep.commands.shared import Json, RunName, Token, Url, connect, fail
from freestep.terminal import print_json, print_line, print_result

__all__ = ["end_worker", "parsed_changes", "pause", "resume", "set_run"]

_SECTIONS = ("aggregation", "groups", "optimizer")
_NO_HYPERPARAMETERS = {
    "aggregation": "name its fields, such as aggregation.batch=4",
    "groups": "name those of a group, such as groups.bias.lr=0.01",
    "paused": "freestep pause and freestep resume are for that",
}
"""Arguments of `Run.set` beside hyperparameters, and what is to be given instead."""


def set_run(
    run: RunName,
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=VALUE...",
            help="Hyperparameters (lr=0.001, schedule.name=constant), fields of the aggregation "
            "(aggregation.policy=async), hyperparameters of param groups (groups.bias.lr=0.01); values as JSON, or as "
            "text where they are none.",
        ),
    ],
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Change a run while it trains, from its next push on."""
    asked = parsed_changes(changes)
    with connect(url, token) as client:
        status = client.run(run).set(
            groups=asked.get("groups"), aggregation=asked.get("aggregation"), **asked.get("optimizer", {})
        )
    _show(status, as_json)


def pause(run: RunName, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """Have a run take no pushes until it is resumed; its workers wait."""
    with connect(url, token) as client:
        _show(client.run(run).pause(), as_json)


def resume(run: RunName, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """Have a paused run take pushes again."""
    with connect(url, token) as client:
        _show(client.run(run).resume(), as_json)


def end_worker(
    run: RunName,
    worker: Annotated[str, typer.Argument(help="The worker's name.")],
    ban: Annotated[
        int | None,
        typer.Option(min=0, max=LONGEST_BAN_S, help="Seconds for which it gets no other lease; 0 lifts that."),
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """End a worker's lease, and refuse it others for some time; without --ban it may take another at once."""
    with connect(url, token) as client:
        ended = client.run(run).end_worker(worker, ban=ban)
    if as_json:
        print_json(ended)
        return
    banned = "" if ban is None else f", and it gets no other for {ban} s" if ban else ", and it may have one"
    print_line((f"the lease of {worker} has ended" if ended.ended else f"{worker} held no lease") + banned)


def parsed_changes(changes: list[str]) -> dict[str, Any]:
    """Changes as the sections of a request; one that is no NAME=VALUE ends the command."""
    asked: dict[str, Any] = {}
    for change in changes:
        name, separator, text = change.partition("=")
        path = name.split(".")
        if path[0] not in _SECTIONS:
            path = ["optimizer", *path]
        if not separator or not all(path) or len(path) < 2:
            fail(2, f"{change!r} is not NAME=VALUE, such as lr=0.001")
        if path[0] == "optimizer" and path[1] in _NO_HYPERPARAMETERS:
            fail(2, f"{change!r} names no hyperparameter: {_NO_HYPERPARAMETERS[path[1]]}")
        place = asked
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                fail(2, f"{change!r} names a member of what another change sets as a whole")
        if path[-1] in place:
            fail(2, f"{change!r} sets what another change sets, too")
        place[path[-1]] = _value(text)
    return asked


def _value(text: str) -> object:
    """What a text is as JSON, or the text itself: JSON has neither NaN nor infinity."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value


def _show(status: RunStatus, as_json: bool) -> None:
    print_result(status, as_json, ("", ""), facts(status))
