"""What the OpenAPI document says beside what FastAPI finds out: the requests and bodies of handlers that it cannot
inspect, and which request may follow on an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.web.answer_headers import AnswerHeader
from freestep_service.web.fields import Field

__all__ = ["STATE", "TENSORS", "answer", "documented", "link"]

TENSORS: dict[str, Any] = {
    "description": "The run's tensors, in safetensors format.",
    "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
}
STATE: dict[str, Any] = {
    **TENSORS,
    "description": "The run's state, in safetensors format: F32 tensors NAME::BUFFER, and a StateDocument as JSON in "
    "the metadata, under freestep.state.",
}


def documented(*fields: Field[Any], body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route that reads these fields itself, and such a body."""
    extra: dict[str, Any] = {"parameters": [field.document() for field in fields]}
    return extra if body is None else {**extra, "requestBody": {**body, "required": True}}


def answer(
    headers: Iterable[AnswerHeader] = (),
    links: Mapping[str, dict[str, Any]] | None = None,
    body: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One of a route's `responses`: what there is to say beside FastAPI's own."""
    made: dict[str, Any] = {**(body or {}), **more}
    if described := {each.name: each.document() for each in headers}:
        made["headers"] = described
    return made | ({"links": dict(links)} if links else {})


def link(operation: str, parameters: Mapping[str, str] | None = None, *, of_run: bool = True) -> dict[str, Any]:
    """A request that may follow on an answer: an operation by its name, and where its parameters are to be found, as
    runtime expressions of OpenAPI.

    of_run: whether the request is about the same run.
    """
    run = {"run": "$request.path.run"} if of_run else {}
    return {"operationId": operation, "parameters": {**run, **(parameters or {})}}
