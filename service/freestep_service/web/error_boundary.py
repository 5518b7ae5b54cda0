"""What is outermost of the application: HEAD where GET is, and the last resort for unexpected exceptions.

These become a problem document for the client and a traceback in the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freestep.errors import ShardUnavailable
from freestep_service.web.connection import HEAD_ONLY, abort
from freestep_service.web.problems import INTERNAL_ERROR, internal_error_response, problem_response

__all__ = ["ErrorBoundary"]

logger = logging.getLogger("freestep")


class ErrorBoundary:
    """ASGI middleware. `observe` is called with the name of each unexpected error."""

    def __init__(self, app: ASGIApp, observe: Callable[[str], None]) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # Answered as GET is; the server leaves the body out. Range is of GET alone (RFC 9110, section 14.2).
            headers = [each for each in scope["headers"] if each[0] != b"range"]
            extensions = {**scope.get("extensions", {}), HEAD_ONLY: {}}
            scope = {**scope, "method": "GET", "headers": headers, "extensions": extensions}
        has_started = False

        async def note_start(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, note_start)
        except ClientDisconnect:
            # There is nobody to answer.
            return
        except asyncio.CancelledError:
            # The server has waited long enough for requests to end, and shuts down.
            if not has_started:
                await problem_response(ShardUnavailable("the service is shutting down"))(scope, receive, send)
            elif not abort(scope):
                raise
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            self._observe(INTERNAL_ERROR)
            if not has_started:
                await internal_error_response()(scope, receive, send)
            elif not abort(scope):
                raise
