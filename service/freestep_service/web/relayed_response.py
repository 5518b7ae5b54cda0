"""An answer whose body comes bit by bit, as from other processes of the service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

import httpx
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from freestep.errors import ShardUnavailable
from freestep_service.web.connection import abort, takes_more, wants_head_only
from freestep_service.web.waiting import while_connected

__all__ = ["RelayedResponse"]

logger = logging.getLogger("freestep")


class RelayedResponse(Response):
    """Sends the chunks of a body as they come; `exchanges`, what they are from, are closed with it.

    The connection is aborted if an owner stops sending, or if the client reads nothing for `stall_s` seconds. Raises
    ClientDisconnect.

    is_endless: whether it goes on for as long as it is read. It then ends, as if it was complete, when the service
    begins to shut down, or the client ends its side.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        status_code: int,
        headers: Mapping[str, str] | None,
        exchanges: AsyncExitStack,
        stall_s: float,
        *,
        is_endless: bool = False,
    ) -> None:
        super().__init__(status_code=status_code)
        self.raw_headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
        self._chunks = chunks
        self._exchanges = exchanges
        self._stall_s = stall_s
        self._is_endless = is_endless

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        async with self._exchanges:
            try:
                async with while_connected(scope, is_waiting=self._is_endless):
                    start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                    await send_in_time(start)
                    if not wants_head_only(scope):
                        async for chunk in self._chunks:
                            await send_in_time({"type": "http.response.body", "body": chunk, "more_body": True})
                    await send_in_time({"type": "http.response.body", "body": b"", "more_body": False})
            except ShardUnavailable:
                if takes_more(scope):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                else:
                    abort(scope)
            except (httpx.HTTPError, TimeoutError) as error:
                logger.warning("%s %s was not relayed to its end: %r", scope["method"], scope["path"], error)
                if not abort(scope):
                    raise
