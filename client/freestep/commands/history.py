"""`freestep history`: the curves of a run over its whole life, and its milestones."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, cast

import typer

from freestep.api.history import CURVES, MOST_POINTS, Curve, CurveName, History
from freestep.client import DEFAULT_URL
from freestep.commands.events import told
from freestep.commands.shared import Json, RunName, Token, Url, connect, fail, or_dash
from freestep.terminal import print_result

__all__ = ["history"]

_MILESTONE_COLUMNS = ("time", "epoch", "step", "what", "")
_COLUMNS = ("curve", "points", "of each", "from step", "to step", "first", "least", "largest", "last")


def history(
    run: RunName,
    curve: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this curve; may be given again. One of {', '.join(CURVES)}, or metrics for all metrics."
        ),
    ] = None,
    points: Annotated[int | None, typer.Option(min=1, max=MOST_POINTS, help="The most points of a curve.")] = None,
    milestones: Annotated[
        bool,
        typer.Option(
            "--milestones", help="What else has happened, instead: leases, changes, checkpoints, shards, data sets."
        ),
    ] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show a run's curves from its creation on: one line for each, or all points with --json.

    A curve has at most 512 points; a point stands for the same number of observations as its neighbours, by their mean,
    the least and the largest. With --milestones, a line for each.
    """
    if milestones and (curve or points is not None):
        fail(2, "--milestones goes without --curve and --points: it shows no curve")
    if unknown := set(curve or ()) - {*CURVES, "metrics"}:
        fail(2, f"--curve: there is no {', '.join(sorted(unknown))}: it is one of {', '.join(CURVES)}, or metrics")
    with connect(url, token) as client:
        if milestones:
            found = client.run(run).history(["milestones"])
            print_result(found, as_json, _MILESTONE_COLUMNS, _milestone_rows(found))
        else:
            found = client.run(run).history(cast("list[CurveName] | None", curve), points=points)
            print_result(found, as_json, _COLUMNS, _rows(found))


def _milestone_rows(found: History) -> Iterator[tuple[object, ...]]:
    for each in found.milestones:
        when = datetime.fromtimestamp(each.time).isoformat(" ", "seconds")
        yield when, each.event.epoch, each.event.step, each.event.kind, told(each.event)


def _rows(found: History) -> Iterator[tuple[object, ...]]:
    named = [*found.curves.items(), *((f"metric {name}", each) for name, each in found.metrics.items())]
    for name, each in named:
        yield name, len(each.step), each.per_point, *_ends(each)


def _ends(curve: Curve) -> tuple[object, ...]:
    """Where a curve begins and ends, and between what it lies."""
    if not curve.step:
        return ("-",) * 6
    values = curve.mean[0], min(curve.min), max(curve.max), curve.mean[-1]
    return curve.step[0], curve.step[-1], *map(or_dash, values)
