"""Work on behalf of a client that is of no use without it, such as waiting for a step: it ends with the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Scope

from freestep.errors import ShardUnavailable
from freestep_service.web.connection import CONNECTION, Connection

__all__ = ["while_connected"]


@asynccontextmanager
async def while_connected(scope: Scope, *, is_waiting: bool) -> AsyncIterator[None]:
    """Cancels its block when the client disconnects, and raises ClientDisconnect.

    is_waiting: whether the block only waits for what others do; it then also ends when the service begins to shut down,
    or the client's side of the connection ends, with ShardUnavailable, since the client can ask again. Under a server
    whose connections are not ours, the block runs to its end.
    """
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    if connection is None:
        yield
        return
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(None) as limit:
            with connection.watched(lambda: limit.reschedule(now()), or_shutdown=is_waiting):
                yield
    except TimeoutError:
        if not limit.expired():
            raise
        if is_waiting and connection.is_stopping:
            raise ShardUnavailable("the service is shutting down") from None
        if is_waiting and connection.is_half_closed:
            raise ShardUnavailable("nobody is waited for who has closed its side of the connection") from None
        raise ClientDisconnect from None
