"""What the OpenAPI document says of paths, queries, headers and bodies that handlers read themselves."""

from __future__ import annotations

from typing import Any, get_args

from freestep.api.models import MOST_SHARDS, Point, PointDtype
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.web.routes.dependencies import LONGEST_LEASE, RUN_NAME

__all__ = [
    "DTYPE",
    "LEASE",
    "PART",
    "POINT",
    "PULL_QUERY",
    "PUSH_HEADERS",
    "RANGE_HEADERS",
    "RUN",
    "TENSORS",
    "TENSORS_BODY",
    "UPLOAD_HEADERS",
]

TENSORS: dict[str, Any] = {
    "description": "The run's tensors, in safetensors format.",
    "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
}
TENSORS_BODY: dict[str, Any] = {**TENSORS, "required": True}


def _header(name: str, kind: str, description: str, *, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": required, "description": description, "schema": {"type": kind}}


def _query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def _path(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


RUN = _path("run", {"type": "string", "pattern": RUN_NAME})
LEASE = _path("lease", {"type": "string", "minLength": 1, "maxLength": LONGEST_LEASE})
PART = [
    RUN,
    _query(
        "shard",
        {"type": "integer", "minimum": 0, "maximum": MOST_SHARDS - 1},
        "The shard whose part the body is; without it the body is the whole model.",
    ),
    _query(
        "of",
        {"type": "integer", "minimum": 1, "maximum": MOST_SHARDS},
        "How many shards the sender takes the run to have.",
    ),
]
POINT = _query("point", {"type": "string", "enum": list(get_args(Point)), "default": "x"}, "The point.")
DTYPE = _query(
    "dtype",
    {"type": "string", "enum": list(get_args(PointDtype)), "default": "F32"},
    "The tensors' dtype. I8: int8, and beside each NAME its NAME::scale, F32, one for each 256 elements; of a run of "
    "several shards only with `shard`.",
)
PULL_QUERY = [
    _query("min_step", {"type": "integer", "minimum": 0, "default": 0}, "The point is of no step before this one."),
    _query("cut", {"type": "string", "maxLength": 200}, "Shards that are asked with the same word answer of one step."),
]
PREFER = _header("Prefer", "string", "RFC 7240: wait=S, in seconds; for pushes also return=representation.")
RANGE_HEADERS = [
    PREFER,
    _header("If-None-Match", "string", "Answers 304 while the point's ETag is the one named."),
    _header("Range", "string", "Bytes of the body to answer with, as after a cut download."),
    _header("If-Range", "string", "Honours Range only while the point's ETag is the one named."),
]
UPLOAD_HEADERS = [
    _header("Idempotency-Key", "string", "With several shards: which parts are of one upload."),
]
PUSH_HEADERS = [
    _header("Freestep-Lease", "string", "The lease.", required=True),
    _header("Freestep-Token", "integer", "The lease's fencing token.", required=True),
    _header("Freestep-Step", "integer", "The step of y at which the gradient was taken.", required=True),
    _header("Idempotency-Key", "string", "Makes this one push, however often it is sent.", required=True),
    _header("Freestep-Samples", "number", "Samples behind the gradient: its weight in a group's mean."),
    _header("Freestep-Loss", "number", "The training loss of the batch."),
    _header("Freestep-Speed", "number", "Steps that the worker takes by itself in a second; its lease shows them."),
    PREFER,
]
