"""What the OpenAPI document says of the requests and bodies of the data path, whose handlers FastAPI cannot inspect."""

from __future__ import annotations

from typing import Any

from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.web.fields import Field

__all__ = ["STATE", "STATE_BODY", "TENSORS", "TENSORS_BODY", "documented"]

TENSORS: dict[str, Any] = {
    "description": "The run's tensors, in safetensors format.",
    "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
}
TENSORS_BODY: dict[str, Any] = {**TENSORS, "required": True}
STATE: dict[str, Any] = {
    **TENSORS,
    "description": "The run's state, in safetensors format: F32 tensors NAME::BUFFER, and a StateDocument as JSON in "
    "the metadata, under freestep.state.",
}
STATE_BODY: dict[str, Any] = {**STATE, "required": True}


def documented(*fields: Field[Any], body: dict[str, Any] | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route that reads these fields itself, and such a body."""
    extra: dict[str, Any] = {"parameters": [field.document() for field in fields]}
    return extra if body is None else {**extra, "requestBody": body}
