"""An answer that comes from other processes of the service while it is sent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

import httpx
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from freestep_service.web.connection import abort

__all__ = ["RelayedResponse"]

logger = logging.getLogger("freestep")


class RelayedResponse(StreamingResponse):
    """Sends the chunks of a body as they come; `exchanges`, the answers that they are from, are closed with it.

    The connection is aborted if an owner stops sending, or if the client reads nothing for `stall_s` seconds.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        status_code: int,
        headers: Mapping[str, str] | None,
        exchanges: AsyncExitStack,
        stall_s: float,
    ) -> None:
        super().__init__(chunks, status_code, headers)
        self._exchanges = exchanges
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        async with self._exchanges:
            try:
                await super().__call__(scope, receive, send_in_time)
            except (httpx.HTTPError, TimeoutError) as error:
                logger.warning("%s %s was not relayed to its end: %r", scope["method"], scope["path"], error)
                if not abort(scope):
                    raise
