"""Bounds on the bodies of the control plane's routes, which are read whole, whatever media type they are sent as."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from freestep.errors import BodyTooLarge, MalformedRequest, ProblemError, RequestTimeout
from freestep_service.web.context import ServiceContext
from freestep_service.web.guard import GuardedRoute

__all__ = ["LONGEST_JSON", "JsonRoute"]

LONGEST_JSON = 16 * 1024**2
"""Bytes: room for the manifest of some hundred thousand tensors."""


class JsonRoute(GuardedRoute):
    """A route that reads no more than LONGEST_JSON bytes of a body, and refuses the rest with BodyTooLarge.

    A body that has not come within `json_seconds` is refused with RequestTimeout.
    """

    def refusals(self) -> set[type[ProblemError]]:
        return super().refusals() | ({BodyTooLarge} if self.body_field is not None else set())

    def unguarded(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().unguarded()

        async def handle(request: Request) -> Response:
            bounded = _BoundedRequest(request.scope, request.receive)
            if self.body_field is not None:
                # Read here, since FastAPI answers 400 for whatever is raised while it reads. It finds the body cached.
                seconds = ServiceContext.of(request).settings.json_seconds
                try:
                    async with asyncio.timeout(seconds):
                        await bounded.body()
                except TimeoutError:
                    raise RequestTimeout(f"a JSON body has to come within {seconds:g} s") from None
            return await handler(bounded)

        return handle


class _BoundedRequest(Request):
    async def stream(self) -> AsyncGenerator[bytes, None]:
        received = 0
        try:
            async for chunk in super().stream():
                received += len(chunk)
                if received > LONGEST_JSON:
                    raise BodyTooLarge(f"a JSON body may have {LONGEST_JSON} bytes", limit=LONGEST_JSON)
                yield chunk
        except ClientDisconnect:
            raise MalformedRequest("the connection was closed before the end of the body") from None
