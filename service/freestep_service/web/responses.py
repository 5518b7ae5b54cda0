"""From memory to the socket: a snapshot is sent as slices of the memory it lies in."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from itertools import pairwise

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from freestep.errors import Overloaded, RangeNotSatisfiable
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.runs.consistent_reads import Reading
from freestep_service.runs.local_shard import LocalShard
from freestep_service.state.snapshots import PointBody

__all__ = ["SnapshotResponse", "etag", "is_known", "parse_range"]

_SLICE = 1024 * 1024
_TAIL = 256 * 1024
"""More than a transport buffers (64 KiB by default), see `_send`."""
_SMALL = 512 * 1024
"""Bytes of a body that it takes less to copy than to send in pieces."""


def etag(epoch: int, step: int, point: str, dtype: str) -> str:
    """The strong validator of a point: equal tags mean equal bytes."""
    return f'"e{epoch}-s{step}-{point}-{dtype}"'


def is_known(tag: str, if_none_match: str) -> bool:
    """Whether an If-None-Match header names a tag, by the weak comparison of RFC 9110 section 8.8.3.2."""
    known = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return tag in known or known == ["*"]


class SnapshotResponse(Response):
    """Answers with a shard's part of a point, or with the range of it that `request_headers` ask for.

    The snapshot is taken when the answer begins and let go when its last byte is on its way. `lines` are headers that
    go with it, by the step that it is of. `otherwise`: the answer where there is no memory for the snapshot.
    """

    def __init__(
        self,
        shard: LocalShard,
        reading: Reading,
        stall_s: float,
        request_headers: Mapping[str, str] | None = None,
        *,
        lines: Callable[[int], Mapping[str, str]] | None = None,
        otherwise: Response | None = None,
    ) -> None:
        super().__init__(media_type=MEDIA_TYPE)
        self._shard = shard
        self._reading = reading
        self._stall_s = stall_s
        self._request_headers = request_headers or {}
        self._lines_of = lines or (lambda _: {})
        self._otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            try:
                snapshot = await stack.enter_async_context(self._shard.read(self._reading))
            except Overloaded:
                if self._otherwise is None:
                    raise
                return await self._otherwise(scope, receive, send)
            tag = etag(snapshot.epoch, snapshot.step, self._reading.point, self._reading.dtype)
            wanted = self._request_headers.get("range")
            if self._request_headers.get("if-range", tag) != tag:
                wanted = None
            span = parse_range(wanted, snapshot.size)
            lines = {
                **self._lines_of(snapshot.step),
                "ETag": tag,
                "Freestep-Step": str(snapshot.step),
                "Freestep-Epoch": str(snapshot.epoch),
                "Accept-Ranges": "bytes",
                "Content-Type": MEDIA_TYPE,
            }
            if snapshot.seq is not None:
                lines["Freestep-Cut"] = str(snapshot.seq)
            await _send(send, snapshot, lines, span, self._stall_s)


async def _send(
    send: Send, snapshot: PointBody, lines: dict[str, str], span: tuple[int, int] | None, stall_s: float
) -> None:
    """Sends a snapshot's body, or the bytes `begin` to `end` of it.

    When this returns, nobody refers to the snapshot's memory any more: the last bytes are sent as a copy that is
    longer than what a transport may still hold. Raises TimeoutError when the peer takes nothing for `stall_s`
    seconds.
    """
    begin, end = span or (0, snapshot.size)
    lines["Content-Length"] = str(end - begin)
    if span:
        lines["Content-Range"] = f"bytes {begin}-{end - 1}/{snapshot.size}"
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": 206 if span else 200, "headers": raw})
    header, data = snapshot.slices(begin, end)
    # Bytes of the tensors before the first that is sent.
    skipped = max(begin - len(snapshot.header), 0)
    bulk = len(data) - _TAIL
    if bulk <= 0 or end - begin <= _SMALL:
        await snapshot.reach(skipped + len(data))
        await send({"type": "http.response.body", "body": b"".join((header, data)), "more_body": False})
        return
    clock = asyncio.get_running_loop().time
    ends = [*range(_SLICE, bulk, _SLICE), bulk, len(data)]
    async with asyncio.timeout(None) as stalled:
        snapshot.end = lambda: stalled.reschedule(clock())

        async def sent(piece: bytes | memoryview, *, more: bool = True) -> None:
            stalled.reschedule(clock() + stall_s)
            await send({"type": "http.response.body", "body": piece, "more_body": more})

        await sent(bytes(header))
        for at, until in pairwise([0, *ends]):
            await snapshot.reach(skipped + until)
            await sent(data[at:until] if until <= bulk else bytes(data[at:until]))
            snapshot.sent = until
        await sent(b"", more=False)


def parse_range(text: str | None, size: int) -> tuple[int, int] | None:
    """The span that a Range header asks for, RFC 9110 section 14; None for the whole body.

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
