"""Answers as JSON whose largest parts, a run's spec and its shards' slices, are not written for each request."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import Response
from pydantic import BaseModel

from freestep.api.models import RunStatus, Topology
from freestep_service.domain.topology import Layout
from freestep_service.runs.run import Run

__all__ = ["json_response", "status_json", "status_response", "topology_response"]


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


def _spliced(model: BaseModel, **members: str) -> str:
    """A model as JSON, where some of its members, not all, are JSON already."""
    others = model.model_dump_json(exclude=set(members))
    return others[:-1] + "".join(f',"{name}":{document}' for name, document in members.items()) + "}"
