"""An answer that tells of a run's events as they happen, as server-sent events.

A reader is sent a frame, of all that is new, a few times a second at the most. The next is made when the last has been
taken, so a slow reader gets fewer, and nothing is kept for it but its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from freestep.errors import ShardUnavailable
from freestep_service.domain.events import Event
from freestep_service.runs.events import EventReader
from freestep_service.web.connection import abort, takes_more, wants_head_only
from freestep_service.web.waiting import while_connected

__all__ = ["EVENT_HEADERS", "EventStream"]

EVENT_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Of the answer: no proxy is to keep frames back."""
_FRAME_S = 0.25
"""Seconds between two frames."""
_PING_S = 15.0
"""Seconds without an event after which a comment is sent, so that no proxy takes the connection for dead."""
_LONGEST_S = 600.0
"""Seconds after which a stream ends, and its reader comes again."""
_PIECE = 64 * 1024
"""Bytes that are sent at a time."""
_RETRY_MS = 1000
"""Milliseconds after which a reader whose stream has ended is to come again."""


class EventStream(EventSourceResponse):
    """Tells a reader of events: of those that are there and, if it follows, of those to come.

    It ends with the connection, with the service's shutdown, when the run's first shard moves, when `is_let_in` says
    that the reader is not any more, when another needs the place, and after ten minutes. Raises ClientDisconnect.
    """

    def __init__(self, reader: EventReader, is_let_in: Callable[[], bool], *, follows: bool) -> None:
        super().__init__((), headers=EVENT_HEADERS)
        self._reader = reader
        self._is_let_in = is_let_in
        self._follows = follows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_piece(body: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        with self._reader:
            try:
                async with while_connected(scope, is_waiting=True):
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    if not wants_head_only(scope):
                        await send_piece(f"retry: {_RETRY_MS}\n\n".encode())
                        async with aclosing(self._pieces()) as pieces:
                            async for piece in pieces:
                                await send_piece(piece)
            except ShardUnavailable:
                # The service shuts down. Who does not read does not hold that up; who does not follow would take the
                # end of the stream for the end of what there is.
                if not (self._follows and takes_more(scope) and self._is_let_in()):
                    abort(scope)
                    return
                for piece in _pieces_of(self._reader.take()):
                    await send_piece(piece)
            if not self._follows and self._reader.is_behind and not wants_head_only(scope):
                # As above.
                abort(scope)
                return
            await send_piece(b"", more=False)

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        reader, clock = self._reader, asyncio.get_running_loop().time
        ends = clock() + _LONGEST_S
        while clock() < ends and not reader.has_ended and self._is_let_in():
            for piece in _pieces_of(reader.take()):
                yield piece
            if reader.is_behind:
                # Others have their turn.
                await asyncio.sleep(0)
                continue
            if not self._follows:
                return
            await asyncio.sleep(_FRAME_S)
            try:
                async with asyncio.timeout(_PING_S):
                    await reader.news()
            except TimeoutError:
                yield KEEPALIVE_COMMENT


def _pieces_of(events: Iterable[Event]) -> Iterator[bytes]:
    """A frame of events as it is sent, in pieces."""
    lines: list[bytes] = []
    size = 0
    for event in events:
        if event.sent is None:
            event.sent = format_sse_event(data_str=event.to_json(), event=event.kind, id=str(event.place))
        lines.append(event.sent)
        size += len(event.sent)
        if size >= _PIECE:
            yield b"".join(lines)
            lines.clear()
            size = 0
    if lines:
        yield b"".join(lines)
