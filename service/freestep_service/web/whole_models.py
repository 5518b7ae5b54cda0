"""Whole models of runs of several shards: points joined from the shards' parts, and bodies split into such parts."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from freestep.api.models import Point, Receipt
from freestep.errors import ShardUnavailable
from freestep.wire.encoding import ITEMSIZE
from freestep.wire.header import encode_header
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.runs.run import Run
from freestep_service.state.bodies import body_metadata
from freestep_service.state.shard import DTYPES
from freestep_service.web.browser_session import SESSION_HEADER
from freestep_service.web.relay import Relay, ShardCall
from freestep_service.web.relayed_response import RelayedResponse
from freestep_service.web.responses import etag, not_modified, requested_span

__all__ = [
    "Part",
    "initialize_whole",
    "of_checkpoint",
    "parts_of_one_place",
    "pull_whole",
    "push_whole",
    "repeated_headers",
]

_ATTEMPTS = 5
_REPEATED = (
    *("authorization", SESSION_HEADER, "cookie"),
    *("freestep-lease", "freestep-token", "freestep-step", "freestep-samples", "freestep-loss", "freestep-speed"),
    "freestep-units",
)
"""Headers of a request for a whole model that the requests for its parts repeat."""


async def pull_whole(
    relay: Relay,
    request: Request,
    run: Run,
    point: Point,
    dtype: str,
    min_step: int,
    prefer: str = "",
    lines: Mapping[str, str] | None = None,
    checkpoint: int | None = None,
) -> Response:
    """The whole of a point, from parts that are of one log position. `lines` are headers that go with it.

    checkpoint: the step of the checkpoint that it is of, None for the run's newest step.
    """
    async with AsyncExitStack() as exchanges:
        query = {"point": point, "dtype": dtype, "min_step": str(min_step), **of_checkpoint(checkpoint)}
        headers = repeated_headers(request) | ({"Prefer": prefer} if prefer else {})
        parts = await parts_of_one_place(relay, exchanges, request, run, "parameters", query, headers)
        epoch, step, position = parts[0].position
        tag = etag(int(epoch), int(step), point, dtype)
        if (known := not_modified(request, {"ETag": tag})) is not None:
            return known
        header = encode_header(run.manifest, dtype, body_metadata(run.name, int(epoch), int(step), point))
        size = len(header) + run.manifest.numel * ITEMSIZE[dtype]
        span = requested_span(request.headers, tag, size)
        begin, end = span or (0, size)
        answered = {
            **(lines or {}),
            "ETag": tag,
            "Freestep-Epoch": epoch,
            "Freestep-Step": step,
            "Freestep-Cut": position,
            "Accept-Ranges": "bytes",
            "Content-Type": MEDIA_TYPE,
            "Content-Length": str(end - begin),
        }
        if rates := parts[0].answer.headers.get("freestep-scheduled-lr"):
            # All shards take the same step.
            answered["Freestep-Scheduled-Lr"] = rates
        if span:
            answered["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        chunks = _sliced(_joined(header, parts, ITEMSIZE[dtype]), begin, end)
        return RelayedResponse(chunks, 206 if span else 200, answered, exchanges.pop_all(), relay.stall_s)


async def push_whole(relay: Relay, request: Request, run: Run, whole: Tensor, headers: Mapping[str, str]) -> Receipt:
    """Pushes a whole gradient, flat [numel]. Raises what any shard refuses it with."""
    answers = await _send_parts(relay, request, run, "POST", "gradients", whole, headers)
    return Receipt.merged([Receipt.model_validate(each) for each in answers])


async def initialize_whole(relay: Relay, request: Request, run: Run, whole: Tensor, key: str) -> None:
    """Uploads whole initial weights, flat [numel], under a key. Raises what any shard refuses them with."""
    await _send_parts(relay, request, run, "PUT", "parameters", whole, {"Idempotency-Key": key})


async def _send_parts(
    relay: Relay, request: Request, run: Run, method: str, path: str, whole: Tensor, headers: Mapping[str, str]
) -> list[Any]:
    """Sends every shard its part of a flat vector; their JSON answers."""
    dtype = next(name for name, each in DTYPES.items() if each == whole.dtype)
    data, size = whole.view(torch.uint8).numpy().data, whole.itemsize

    def body(index: int) -> Sequence[memoryview]:
        part = run.manifest.part(index, run.count)
        return memoryview(encode_header(part, dtype)), data[size * part.begin : size * part.end]

    call = ShardCall(method, path, {**repeated_headers(request), **headers, "Content-Type": MEDIA_TYPE}, body=body)
    async with AsyncExitStack() as exchanges:
        answers = await relay.call_all(exchanges, request, run, call)
        return [json.loads(await answer.aread()) for answer in answers]


def of_checkpoint(step: int | None) -> dict[str, str]:
    """What the requests for the parts of a checkpoint have in their query; nothing for those of the newest step."""
    return {} if step is None else {"checkpoint": str(step)}


def repeated_headers(request: Request) -> dict[str, str]:
    """The headers of a request for a whole that the requests for its parts have too."""
    return {name: request.headers[name] for name in _REPEATED if name in request.headers}


@dataclass(frozen=True)
class Part:
    """A shard's answer with its part of a point; the body has not been read."""

    answer: httpx.Response
    manifest: Manifest

    @property
    def position(self) -> tuple[str, str, str]:
        """The epoch, the step and the log position that it is of."""
        headers = self.answer.headers
        return headers["freestep-epoch"], headers["freestep-step"], headers["freestep-cut"]

    async def tensors(self, size: int) -> AsyncIterator[bytes]:
        """The last `size` bytes of the body: its tensors, without the safetensors header."""
        skip = int(self.answer.headers["content-length"]) - size
        async for chunk in self.answer.aiter_raw():
            if skip < len(chunk):
                yield chunk[skip:]
            skip = max(skip - len(chunk), 0)


async def parts_of_one_place(
    relay: Relay,
    exchanges: AsyncExitStack,
    request: Request,
    run: Run,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
) -> list[Part]:
    """All shards' answers to a pull of what is below the run's path, of one log position."""
    for _ in range(_ATTEMPTS):
        attempt = await exchanges.enter_async_context(AsyncExitStack())
        call = ShardCall("GET", path, headers, {**query, "cut": secrets.token_hex(16)})
        answers = await relay.call_all(attempt, request, run, call)
        parts = [Part(answer, run.manifest.part(index, len(answers))) for index, answer in enumerate(answers)]
        if len({part.position for part in parts}) == 1:
            return parts
        await attempt.aclose()
    raise ShardUnavailable("the shards' parts are of different steps")


async def _joined(header: bytes, parts: Sequence[Part], itemsize: int) -> AsyncIterator[bytes]:
    """The body of the whole model: its own safetensors header, and the tensors of all parts in order."""
    yield header
    for part in parts:
        async for chunk in part.tensors(part.manifest.numel * itemsize):
            yield chunk


async def _sliced(chunks: AsyncIterator[bytes], begin: int, end: int) -> AsyncIterator[bytes]:
    """Bytes `begin` to `end` of a body, of which nothing is read behind these."""
    at = 0
    async for chunk in chunks:
        piece = chunk[max(begin - at, 0) : end - at]
        at += len(chunk)
        if piece:
            yield piece
        if at >= end:
            return
