"""Answers as JSON whose largest parts, a run's spec and its shards' slices, are not written for each request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping

from fastapi import Response
from pydantic import BaseModel
from pydantic_core import to_json

from freestep.api.models import RunStatus, Topology
from freestep_service.domain.curves import Curve
from freestep_service.domain.history import HistoryCurves
from freestep_service.domain.topology import Layout
from freestep_service.runs.run import Run

__all__ = ["history_response", "json_response", "status_json", "status_response", "topology_response"]


def json_response(document: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of a document that is JSON already."""
    return Response(document, status, headers, "application/json")


async def status_response(run: Run, status: int = 200) -> Response:
    """A run's status as an answer."""
    return json_response(status_json(await run.status(), run), status)


def status_json(status: RunStatus, run: Run) -> str:
    """A run's status as JSON."""
    return _spliced(status, spec=run.canonical_spec)


def topology_response(topology: Topology, layout: Layout) -> Response:
    """A run's topology as an answer; the layout is that of its number of shards."""
    shards = zip(topology.shards, layout.documents, strict=True)
    listed = ",".join(_spliced(shard, slices=slices) for shard, slices in shards)
    return json_response(_spliced(topology, shards=f"[{listed}]"))


async def history_response(run: str, history: HistoryCurves, curves: Iterable[str], points: int) -> Response:
    """A run's history as an answer: some of its curves, and metrics and milestones if those are among them."""
    wanted = set(curves)
    # Copied at once: all are of the same moment.
    shown = {name: curve.copy() for name, curve in history.curves.items() if name in wanted}
    metrics = {name: curve.copy() for name, curve in history.metrics.items()} if "metrics" in wanted else {}
    epochs = [each._asdict() for each in history.epochs]
    kept = history.milestones.all() if "milestones" in wanted else []
    milestones = ",".join(f'{{"time":{each.time!r},"event":{each.event}}}' for each in kept)
    head = {"run": run, "epoch": history.epoch, "step": history.step, "epochs": epochs}
    return json_response(
        f'{json.dumps(head)[:-1]},"curves":{await _curves_json(shown, points)},'
        f'"metrics":{await _curves_json(metrics, points)},'
        f'"milestones":[{milestones}]}}'
    )


async def _curves_json(curves: Mapping[str, Curve], points: int) -> str:
    """Curves as JSON, thinned to so many points."""
    pieces: list[str] = []
    for name, curve in curves.items():
        curve.thin(points)
        pieces.append(f"{json.dumps(name)}:{to_json({'per_point': curve.per_point, **curve.columns()}).decode()}")
        # Others have their turn.
        await asyncio.sleep(0)
    return f"{{{','.join(pieces)}}}"


def _spliced(model: BaseModel, **members: str) -> str:
    """A model as JSON, where some of its members, not all, are JSON already."""
    others = model.model_dump_json(exclude=set(members))
    return others[:-1] + "".join(f',"{name}":{document}' for name, document in members.items()) + "}"
