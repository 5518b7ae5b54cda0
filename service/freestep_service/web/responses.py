"""Answers with a shard's part of a point, sent as slices of the memory that its snapshot lies in."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from itertools import pairwise
from time import monotonic

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from freestep.errors import Overloaded, RangeNotSatisfiable
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.runs.consistent_reads import Reading
from freestep_service.runs.local_shard import LocalShard
from freestep_service.state.shared_memory import SharedMemory
from freestep_service.state.snapshots import PointBody
from freestep_service.web.connection import CONNECTION, abort, takes_more, wants_head_only
from freestep_service.web.headers import scheduled_lr
from freestep_service.web.waiting import while_connected

__all__ = ["SnapshotResponse", "etag", "not_modified", "parse_range", "requested_span"]

_SLICE = 1024 * 1024
_TAIL = 256 * 1024
"""More than a transport buffers (64 KiB by default), see `_send`."""
SHORT = 512 * 1024
"""Bytes of a body that is faster to copy than to send in pieces."""


def etag(epoch: int, step: int, point: str, dtype: str) -> str:
    """The strong validator of a point: equal tags mean equal bytes."""
    return f'"e{epoch}-s{step}-{point}-{dtype}"'


def not_modified(request: Request, headers: Mapping[str, str]) -> Response | None:
    """The answer 304, with these headers, where If-None-Match names the ETag that is one of them; else None.

    By the weak comparison of RFC 9110, section 8.8.3.2.
    """
    listed = ",".join(request.headers.getlist("if-none-match"))
    known = [each.strip().removeprefix("W/") for each in listed.split(",")]
    return Response(status_code=304, headers=headers) if headers["ETag"] in known or known == ["*"] else None


class SnapshotResponse(Response):
    """A shard's part of a point, or the range of it that `request_headers` ask for.

    The snapshot is taken when the answer begins and released when the transport refers to it no more. `lines(step)` are
    further headers of an answer of that step. The connection is aborted if the client reads nothing for `stall_s`
    seconds. `otherwise`: the answer if there is no memory for the snapshot. `spend` is told how many bytes are sent,
    `answered` how many seconds it took once all are. `memory`: shared with the client, who finds the whole there if it
    has room.
    """

    def __init__(
        self,
        shard: LocalShard,
        reading: Reading,
        stall_s: float,
        request_headers: Mapping[str, str] | None = None,
        *,
        lines: Callable[[int], Mapping[str, str]] | None = None,
        otherwise: Callable[[], Response] | None = None,
        spend: Callable[[int], None] = lambda size: None,
        answered: Callable[[float], None] = lambda seconds: None,
        memory: SharedMemory | None = None,
    ) -> None:
        super().__init__(media_type=MEDIA_TYPE)
        self._shard = shard
        self._reading = reading
        self._stall_s = stall_s
        self._request_headers = request_headers or {}
        self._lines_of = lines or (lambda _: {})
        self._otherwise = otherwise
        self._spend = spend
        self._answered = answered
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = monotonic()
        async with AsyncExitStack() as stack:
            try:
                snapshot = await stack.enter_async_context(self._read(scope))
            except Overloaded:
                if self._otherwise is None:
                    raise
                return await self._otherwise()(scope, receive, send)
            tag = etag(snapshot.epoch, snapshot.step, self._reading.point, self._reading.dtype)
            span = requested_span(self._request_headers, tag, snapshot.size)
            lines = {
                **self._lines_of(snapshot.step),
                "ETag": tag,
                "Freestep-Step": str(snapshot.step),
                "Freestep-Epoch": str(snapshot.epoch),
                "Accept-Ranges": "bytes",
                "Content-Type": MEDIA_TYPE,
            }
            if snapshot.scheduled_lr is not None:
                lines["Freestep-Scheduled-Lr"] = scheduled_lr(snapshot.scheduled_lr)
            if snapshot.seq is not None:
                lines["Freestep-Cut"] = str(snapshot.seq)
            begin, end = span or (0, snapshot.size)
            lines["Content-Length"] = str(end - begin)
            if span:
                lines["Content-Range"] = f"bytes {begin}-{end - 1}/{snapshot.size}"
            is_head_only, laid = wants_head_only(scope), None
            if self._memory is not None and not span and not is_head_only:
                laid = await self._memory.lay(snapshot)
            if laid is not None:
                lines |= {"Content-Length": "0", "Freestep-Span": str(laid), "Cache-Control": "no-store"}
            raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in lines.items()]
            start: Message = {"type": "http.response.start", "status": 206 if span else 200, "headers": raw}
            if not is_head_only:
                self._spend(end - begin)
            if is_head_only or laid is not None:
                await send(start)
                await send({"type": "http.response.body"})
                if laid is not None:
                    self._answered(monotonic() - began)
                return
            if end - begin > SHORT:
                with _aborted_on_failure(scope, self._stall_s):
                    await _send(scope, send, start, snapshot, begin, end, self._stall_s)
                    self._answered(monotonic() - began)
                return
            await snapshot.reach(end - len(snapshot.header))
            if is_early := takes_more(scope):
                # The client parses the head while the body is copied.
                await send(start)
            body = b"".join(snapshot.slices(begin, end))
        # However slowly the client reads, the snapshot's memory is free.
        if not is_early:
            await send(start)
        await send({"type": "http.response.body", "body": body, "more_body": False})
        self._answered(monotonic() - began)

    def _read(self, scope: Scope) -> AbstractAsyncContextManager[PointBody]:
        reading = self._shard.read(self._reading)
        is_waited_for = self._reading.patience > 0 or self._reading.checkpoint is not None
        return _begun_while_connected(scope, reading) if is_waited_for else reading


@asynccontextmanager
async def _begun_while_connected(
    scope: Scope, reading: AbstractAsyncContextManager[PointBody]
) -> AsyncIterator[PointBody]:
    """A snapshot that may have to be waited for, which ends with the client's connection."""
    async with AsyncExitStack() as stack:
        async with while_connected(scope, is_waiting=True):
            snapshot = await stack.enter_async_context(reading)
        yield snapshot


@contextmanager
def _aborted_on_failure(scope: Scope, stall_s: float) -> Iterator[None]:
    """Aborts the connection if its block fails, since the transport refers to memory that is about to be used again.

    A client that reads nothing is no error of the service's: it is logged, and the exception ends here.
    """
    try:
        yield
    except BaseException as error:
        is_slow = isinstance(error, TimeoutError)
        if not abort(scope, stall_s if is_slow else None) or not is_slow:
            raise


async def _send(
    scope: Scope, send: Send, start: Message, snapshot: PointBody, begin: int, end: int, stall_s: float
) -> None:
    """Sends bytes `begin` to `end` of a snapshot's body, more than SHORT.

    When this returns, nothing refers to the snapshot's memory any more: the last bytes are sent as a copy that is
    longer than what a transport may still buffer. Raises TimeoutError if the client reads nothing for `stall_s`
    seconds; the connection has to be aborted then. A server whose connections cannot be aborted gets copies only.
    """
    header, data = snapshot.slices(begin, end)
    # Bytes of the tensors before the first one that is sent.
    skipped = max(begin - len(snapshot.header), 0)
    bulk = max(len(data) - _TAIL, 0) if CONNECTION in scope.get("extensions", {}) else 0

    clock = asyncio.get_running_loop().time
    async with asyncio.timeout(None) as stalled:
        # If the memory is needed and the client is slow, its pool ends the sending.
        snapshot.end = lambda: stalled.reschedule(clock())

        async def send_in_time(message: Message) -> None:
            stalled.reschedule(clock() + stall_s)
            await send(message)

        await send_in_time(start)
        await send_in_time({"type": "http.response.body", "body": bytes(header), "more_body": True})
        for at, until in pairwise([*range(0, bulk, _SLICE), *range(bulk, len(data), _SLICE), len(data)]):
            await snapshot.reach(skipped + until)
            piece = data[at:until] if until <= bulk else bytes(data[at:until])
            await send_in_time({"type": "http.response.body", "body": piece, "more_body": True})
            snapshot.sent = until
        await send_in_time({"type": "http.response.body", "body": b"", "more_body": False})
    snapshot.end = lambda: None


def requested_span(headers: Mapping[str, str], tag: str, size: int) -> tuple[int, int] | None:
    """The bytes that Range and If-Range ask for of a body with a tag; None for the whole body.

    Raises RangeNotSatisfiable.
    """
    return parse_range(headers.get("range") if headers.get("if-range", tag) == tag else None, size)


def parse_range(text: str | None, size: int) -> tuple[int, int] | None:
    """The span that a Range header asks for, RFC 9110, section 14; None for the whole body.

    Several ranges, or what is not a byte range (or one of 10^18 and more), are answered with the whole body, as the
    RFC allows. Raises RangeNotSatisfiable when the range begins past the end.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (text or "").strip())
    if match is None or match.group() == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        begin, end = max(size - int(last), 0), size
    else:
        begin, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < begin:
            return None
    if begin >= size or begin >= end:
        raise RangeNotSatisfiable(f"the body has {size} bytes", size=size)
    return begin, end
