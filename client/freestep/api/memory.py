"""The JSON about memory that a client and a service on one machine share: asked for, offered, and handed over."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from freestep.api.spec import MOST_SHARDS
from freestep.api.validation import LARGEST_INTEGER, Count, StrictModel

__all__ = ["SOCKET_NAME", "MemoryGrant", "MemoryOffer", "MemoryRequest"]

_DIGITS = "[0-9a-f]{32}"
SOCKET_NAME = f"freestep-{_DIGITS}"
"""What the name of the Unix socket matches that memory is to be had from."""


class MemoryRequest(StrictModel):
    """A request for memory that this service and a client on its machine share."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"token": 1, "body_bytes": 4096, "answer_bytes": 4096}]})

    token: Count
    """The lease's fencing token."""
    shard: Annotated[int, Field(strict=True, ge=0, lt=MOST_SHARDS)] = 0
    """The shard whose bodies it is for; this process has to be its owner."""
    body_bytes: Count
    """Bytes of the longest body of a push that is to lie in it; more than any takes are not given."""
    answer_bytes: Count
    """Bytes of the tensors of the longest answer that is to be written into it; as above."""


class _Answer(BaseModel):
    """An answer of the service; unknown members, which newer services may add, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class MemoryOffer(_Answer):
    """Where the memory is to be had, within seconds, by a process of the service's user on its machine.

    Neither text can be another: a service elsewhere must not have its clients send anything to any socket of theirs.
    """

    socket: Annotated[str, Field(pattern=f"^{SOCKET_NAME}$")]
    """The name of an abstract Unix socket, without the zero byte that it begins with."""
    ticket: Annotated[str, Field(pattern=f"^{_DIGITS}$")]
    """What is to be sent to that socket, followed by a line feed."""


class MemoryGrant(_Answer):
    """What comes over that socket: a line of JSON, with the memory's file descriptor beside it."""

    memory: str
    """The memory's name in the header `Freestep-Memory`."""
    size: Annotated[int, Field(gt=0, le=LARGEST_INTEGER)]
    """Bytes of the memory."""
    body: Count
    """Bodies of pushes lie within the first so many bytes."""
    tensors: Count
    """The byte at which the tensors of every answer begin; their header ends there."""
