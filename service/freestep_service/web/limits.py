"""A bound on bodies that are read whole: all but tensors, which have bounds of their own."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freestep.errors import BodyTooLarge
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.web.problems import STATUSES

__all__ = ["JsonLimit"]

LONGEST_JSON = 16 * 1024**2
"""Bytes: room for the manifest of some hundred thousand tensors."""


class JsonLimit:
    """Middleware that ends the reading of a body past LONGEST_JSON with body-too-large."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or Headers(scope=scope).get("content-type") == MEDIA_TYPE:
            await self._app(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > LONGEST_JSON:
                # FastAPI lets no other exception through while it reads a body.
                raise HTTPException(STATUSES[BodyTooLarge], f"a JSON body may have {LONGEST_JSON} bytes")
            return message

        await self._app(scope, bounded, send)
