"""Whole states of runs: a shard's part as an answer, parts joined to a whole, and a whole split into parts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack

import httpx
from starlette.requests import Request
from starlette.responses import Response

from freestep.wire.encoding import ITEMSIZE
from freestep.wire.header import PREFIX, parse_header
from freestep.wire.receiver import MEDIA_TYPE
from freestep.wire.state import encode_state_header, parse_document
from freestep_service.domain.records import CheckpointId
from freestep_service.runs.local_shard import LocalShard
from freestep_service.runs.run import Run
from freestep_service.state.buffers import memory_of
from freestep_service.state.received_state import ReceivedState, document_of
from freestep_service.web.relay import Relay, ShardCall
from freestep_service.web.relayed_response import RelayedResponse
from freestep_service.web.responses import etag
from freestep_service.web.whole_models import of_checkpoint, parts_of_one_place, repeated_headers

__all__ = ["export_part", "export_whole", "send_parts"]

_PIECE = 1024 * 1024
_OWNED_S, _PAUSE_S = 20.0, 0.1
"""Seconds for which the shards of a new run are waited for until they have owners, and between two looks."""
_SIZE = ITEMSIZE["F32"]


async def export_part(
    run: Run, shard: LocalShard, word: str, stall_s: float, checkpoint: CheckpointId | None = None
) -> Response:
    """A shard's part of the state, or all of it where there is one shard; `word`: what goes with all parts.

    checkpoint: that it is read of, None for the newest step.
    """
    async with AsyncExitStack() as stack:
        reading = shard.read_state(word, run.count) if checkpoint is None else shard.read_checkpoint(checkpoint)
        copy = await stack.enter_async_context(reading)
        document = document_of(run.spec, copy)
        header = encode_state_header(shard.core.manifest, document)
        vectors = [memory_of(copy.tensors[name]) for name in document.buffers]
        size = len(header) + sum(map(len, vectors))
        lines = _lines(copy.epoch, copy.step, copy.seq, size)
        return RelayedResponse(_pieces([memoryview(header), *vectors]), 200, lines, stack.pop_all(), stall_s)


async def export_whole(relay: Relay, request: Request, run: Run, checkpoint: int | None = None) -> Response:
    """The state of a run of several shards, from parts that are of one place in the log.

    checkpoint: the step of the checkpoint that it is of, None for the run's newest step.
    """
    query, headers = of_checkpoint(checkpoint), repeated_headers(request)
    async with AsyncExitStack() as exchanges:
        parts = await parts_of_one_place(relay, exchanges, request, run, "state", query, headers)
        streams = [_Stream(part.answer) for part in parts]
        document = parse_document((await asyncio.gather(*(stream.metadata() for stream in streams)))[0])
        header = encode_state_header(run.manifest, document)
        epoch, step, place = map(int, parts[0].position)
        lines = _lines(epoch, step, place, len(header) + _SIZE * run.manifest.numel * len(document.buffers))
        sizes = [_SIZE * part.manifest.numel for part in parts]
        chunks = _joined(header, streams, sizes, len(document.buffers))
        return RelayedResponse(chunks, 200, lines, exchanges.pop_all(), relay.stall_s)


async def send_parts(relay: Relay, request: Request, run: Run, received: ReceivedState, attempt: str) -> list[str]:
    """Has the owners of all shards hold their parts of a state; the tokens under which they own these, by shard.

    attempt: the name under which they hold them.

    Raises what any of them refuses its part with, and ShardUnavailable.
    """
    vectors = [memory_of(vector) for vector in received.vectors.values()]

    def body(index: int) -> Sequence[memoryview]:
        part = run.manifest.part(index, run.count)
        header = memoryview(encode_state_header(part, received.document))
        return header, *(vector[_SIZE * part.begin : _SIZE * part.end] for vector in vectors)

    await _have_owners(run)
    headers = {**repeated_headers(request), "Content-Type": MEDIA_TYPE, "Idempotency-Key": attempt}
    call = ShardCall("PUT", "state", headers, body=body)
    async with AsyncExitStack() as exchanges:
        answers = await relay.call_all(exchanges, request, run, call)
        return [json.loads(await answer.aread())["token"] for answer in answers]


async def _have_owners(run: Run) -> None:
    """Returns when all shards have owners, or after some time: those of a new run are taken one after another."""
    deadline = asyncio.get_running_loop().time() + _OWNED_S
    while (await run.topology()).missing and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_PAUSE_S)


def _lines(epoch: int, step: int, place: int, size: int) -> dict[str, str]:
    """The headers of an answer of `size` bytes."""
    return {
        "ETag": etag(epoch, step, "state", "F32"),
        "Freestep-Epoch": str(epoch),
        "Freestep-Step": str(step),
        "Freestep-Cut": str(place),
        "Content-Type": MEDIA_TYPE,
        "Content-Length": str(size),
    }


async def _pieces(views: Iterable[memoryview]) -> AsyncIterator[bytes]:
    for view in views:
        for begin in range(0, len(view), _PIECE):
            # A memoryview will do; the annotation is ASGI's.
            yield view[begin : begin + _PIECE]  # type: ignore[misc]


class _Stream:
    """A part's answer, read bit by bit."""

    def __init__(self, answer: httpx.Response) -> None:
        self._chunks = answer.aiter_raw()
        self._left = b""

    async def read(self, size: int) -> AsyncIterator[bytes]:
        """The next `size` bytes. Raises httpx.RemoteProtocolError if the answer ends before."""
        while size:
            chunk = self._left or await anext(self._chunks, b"")
            if not chunk:
                raise httpx.RemoteProtocolError("a shard's part of the state ended too early")
            piece, self._left = chunk[:size], chunk[size:]
            size -= len(piece)
            yield piece

    async def metadata(self) -> dict[str, str]:
        """The metadata of the header, which is read."""
        length = int.from_bytes(b"".join([piece async for piece in self.read(PREFIX)]), "little")
        _, metadata = parse_header(b"".join([piece async for piece in self.read(length)]))
        return metadata


async def _joined(
    header: bytes, streams: Sequence[_Stream], sizes: Sequence[int], vectors: int
) -> AsyncIterator[bytes]:
    """The whole state: of each vector all parts, one after another."""
    yield header
    for _ in range(vectors):
        for stream, size in zip(streams, sizes, strict=True):
            async for piece in stream.read(size):
                yield piece
