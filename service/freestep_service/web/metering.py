"""Bytes of tensors, counted against the quota of the token that moves them.

They are counted once: by the process that the caller talks to. What that sends to and gets from other processes of the
service for it, these do not count again.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.web.connection import wants_head_only
from freestep_service.web.context import ServiceContext
from freestep_service.web.guard import caller

__all__ = ["admit_bytes", "spend_answer", "spend_bytes"]

_COUNTED = "freestep.counted"
"""In the scope of an ASGI request whose bytes another process has counted."""


async def admit_bytes(request: Request, size: int = 0) -> None:
    """Counts a body that is about to be received; without one, asks whether its answer may be sent.

    Raises Overloaded, before anything is read.
    """
    context, token = ServiceContext.of(request), caller(request)
    quotas = context.registry.quotas
    if not quotas.bounds_bytes(token):
        return
    if await context.relay.is_relayed(request):
        request.scope[_COUNTED] = True
        return
    quotas.admit_bytes(token)
    quotas.spend_bytes(token, size)


def spend_bytes(request: Request, size: int) -> None:
    """Counts bytes that are received or sent, of a request that `admit_bytes` has admitted; below 0, no longer."""
    if _COUNTED not in request.scope:
        ServiceContext.of(request).registry.quotas.spend_bytes(caller(request), size)


def spend_answer(request: Request, answer: Response) -> Response:
    """Counts an answer, whose length its head says, if it is of tensors; returns it."""
    if answer.headers.get("content-type") == MEDIA_TYPE and not wants_head_only(request.scope):
        spend_bytes(request, int(answer.headers["content-length"]))
    return answer
