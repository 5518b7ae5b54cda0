"""Other processes that own what this one is asked for: requests are relayed to them, and whole models made of parts.

This is the slow way, for who knows one URL only: clients that read the topology ask the owners themselves.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import torch
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from torch import Tensor

from freestep.api.models import Point, Receipt
from freestep.errors import CoordinatorUnavailable, MalformedRequest, ProblemError, ShardUnavailable
from freestep.wire.encoding import ITEMSIZE
from freestep.wire.header import encode_header
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.coordination.run_scripts import not_open
from freestep_service.runs.run import Run
from freestep_service.state.bodies import body_metadata
from freestep_service.state.shard import DTYPES
from freestep_service.web.responses import etag, is_known, parse_range

__all__ = ["Relay", "stall_seconds"]

RELAYED = "freestep-relayed"
"""The header of a request that comes from another process of the service: it is not relayed again, and its answer may
stand still for longer, since a whole model is sent on shard by shard."""

_RELAYED_STALL_S = 600.0
_PIECE = 256 * 1024
_TIMEOUT_S = 60.0
_OPENING_S, _PAUSE_S = 5.0, 0.2
_ATTEMPTS = 5
_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailers",
    b"transfer-encoding", b"upgrade", b"host", b"date", b"server",
}  # fmt: skip
_FORWARDED = (
    "authorization",
    *("freestep-lease", "freestep-token", "freestep-step", "freestep-samples", "freestep-loss", "freestep-speed"),
)


@dataclass(frozen=True)
class _Part:
    """An answer with a shard's part of a point, whose body has not been read."""

    answer: httpx.Response
    manifest: Manifest

    @property
    def cut(self) -> tuple[str, ...]:
        return tuple(self.answer.headers[name] for name in ("freestep-epoch", "freestep-step", "freestep-cut"))

    async def tensors(self, size: int) -> AsyncIterator[bytes]:
        """The body from behind its header on: `size` bytes."""
        skip = int(self.answer.headers["content-length"]) - size
        async for chunk in self.answer.aiter_raw():
            if skip < len(chunk):
                yield chunk[skip:]
            skip = max(skip - len(chunk), 0)


class Relay:
    """HTTP to the other processes, and to this one where it owns a part of what is wanted whole."""

    def __init__(self, trusted: ssl.SSLContext) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        timeout = httpx.Timeout(_TIMEOUT_S, connect=5.0, read=660.0)
        # Between the processes of one service there is no proxy.
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, verify=trusted)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def forward(self, request: Request, run: Run, index: int = 0, content: bytes | None = None) -> Response:
        """Has a shard's owner answer a request; `content` is its body, where that was read already.

        Raises ShardUnavailable when the owner cannot be reached.
        """
        url = run.owner_url(index)
        if url is None:
            # Without waiting for the next heartbeat.
            await run.keep()
            url = run.owner_url(index)
        if url is None or RELAYED in request.headers:
            run.shard(index)
            raise ShardUnavailable("the shard has come here in the meantime")
        headers = [(name, value) for name, value in request.headers.raw if name not in _HOP_BY_HOP]
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        made = self._http.build_request(
            request.method,
            url + path,
            headers=[*headers, (RELAYED.encode(), b"1")],
            content=content or (request.stream() if has_body else None),
        )
        answer = await self._send(made)
        lines = {name: value for name, value in answer.headers.items() if name.encode() not in _HOP_BY_HOP}
        response = StreamingResponse(answer.aiter_raw(), answer.status_code)
        response.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in lines.items()]
        response.background = BackgroundTask(answer.aclose)
        return response

    async def pull(
        self,
        request: Request,
        run: Run,
        point: Point,
        dtype: str,
        min_step: int,
        prefer: str = "",
        lines: Mapping[str, str] | None = None,
    ) -> Response:
        """The whole of a point, of one cut, as its parts come in."""
        async with AsyncExitStack() as stack:
            parts = await self._parts(stack, request, run, point, dtype, min_step, prefer)
            epoch, step = (int(each) for each in parts[0].cut[:2])
            tag = etag(epoch, step, point, dtype)
            if is_known(tag, request.headers.get("if-none-match", "")):
                return Response(status_code=304, headers={"ETag": tag})
            header = encode_header(run.manifest, dtype, body_metadata(run.name, epoch, step, point))
            size = len(header) + run.manifest.numel * ITEMSIZE[dtype]
            wanted = request.headers.get("range") if request.headers.get("if-range", tag) == tag else None
            span = parse_range(wanted, size)
            begin, end = span or (0, size)
            headers = {
                **(lines or {}),
                "ETag": tag,
                "Freestep-Epoch": str(epoch),
                "Freestep-Step": str(step),
                "Freestep-Cut": parts[0].cut[2],
                "Accept-Ranges": "bytes",
                "Content-Length": str(end - begin),
            }
            if span:
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
            body = _slice(_joined(stack.pop_all(), header, parts, ITEMSIZE[dtype]), begin, end)
            return StreamingResponse(body, 206 if span else 200, headers, MEDIA_TYPE)

    async def _parts(
        self, stack: AsyncExitStack, request: Request, run: Run, point: str, dtype: str, min_step: int, prefer: str
    ) -> list[_Part]:
        """All shards' answers, of one cut."""
        for _ in range(_ATTEMPTS):
            ticket = secrets.token_hex(16)
            query = {"point": point, "dtype": dtype, "min_step": str(min_step), "cut": ticket}
            headers = {**_forwarded(request), RELAYED: "1"}
            if prefer:
                headers["Prefer"] = prefer
            attempt = await stack.enter_async_context(AsyncExitStack())
            answers = await self._ask_all(attempt, run, "GET", "parameters", query, headers)
            parts = [_Part(answer, run.manifest.part(index, run.count)) for index, answer in enumerate(answers)]
            if len({part.cut for part in parts}) == 1:
                return parts
            await attempt.aclose()
        raise ShardUnavailable("the shards did not agree on a cut")

    async def send(
        self,
        request: Request,
        run: Run,
        method: str,
        path: str,
        whole: Tensor,
        headers: Mapping[str, str],
    ) -> list[Any]:
        """Sends every shard its part of a flat vector; their JSON answers. Raises what any refuses with."""
        dtype = next(name for name, each in DTYPES.items() if each == whole.dtype)
        data, size = whole.view(torch.uint8).numpy().data, whole.itemsize

        def content(index: int) -> tuple[int, AsyncIterator[memoryview]]:
            part = run.manifest.part(index, run.count)
            pieces = [memoryview(encode_header(part, dtype)), data[size * part.begin : size * part.end]]
            return sum(map(len, pieces)), _pieces(pieces)

        async with AsyncExitStack() as stack:
            lines = {**_forwarded(request), **headers, RELAYED: "1", "Content-Type": MEDIA_TYPE}
            answers = await self._ask_all(stack, run, method, path, {}, lines, content)
            return [json.loads(await answer.aread()) for answer in answers]

    async def push(self, request: Request, run: Run, whole: Tensor, headers: Mapping[str, str]) -> Receipt:
        """Pushes a whole gradient."""
        receipts = [
            Receipt.model_validate(each) for each in await self.send(request, run, "POST", "gradients", whole, headers)
        ]
        return Receipt.merged(receipts)

    async def _ask_all(
        self,
        stack: AsyncExitStack,
        run: Run,
        method: str,
        path: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        content: Callable[[int], tuple[int, AsyncIterator[memoryview]]] | None = None,
    ) -> list[httpx.Response]:
        if missing := (await run.topology()).missing:
            raise not_open(run.name, missing)

        async def ask(index: int) -> httpx.Response:
            """One shard's answer; while the shard is being opened the others wait for it."""
            deadline = asyncio.get_running_loop().time() + _OPENING_S
            while True:
                try:
                    return await ask_once(index)
                except ShardUnavailable:
                    if asyncio.get_running_loop().time() > deadline:
                        raise
                    await asyncio.sleep(_PAUSE_S)

        async def ask_once(index: int) -> httpx.Response:
            # Anew each time, since ownership moves.
            owner = (await run.topology()).shards[index].url
            if owner is None:
                raise not_open(run.name, [index])
            url = f"{owner}/v1/runs/{run.name}/{path}"
            lines = dict(headers)
            body = None
            if content is not None:
                length, body = content(index)
                lines["Content-Length"] = str(length)
            params = {**query, "shard": str(index), "of": str(run.count)}
            made = self._http.build_request(method, url, params=params, headers=lines, content=body)  # type: ignore[arg-type]
            answer = await self._send(made)
            stack.push_async_callback(answer.aclose)
            if not answer.is_success:
                raise await _problem(answer)
            return answer

        answers = await asyncio.gather(*map(ask, range(run.count)), return_exceptions=True)
        failures = [each for each in answers if isinstance(each, BaseException)]
        # A refusal rather than what came of it elsewhere.
        failures.sort(key=lambda error: isinstance(error, ShardUnavailable | CoordinatorUnavailable))
        if failures:
            raise failures[0]
        return [each for each in answers if isinstance(each, httpx.Response)]

    async def _send(self, made: httpx.Request) -> httpx.Response:
        made.headers["Accept-Encoding"] = "identity"
        try:
            return await self._http.send(made, stream=True)
        except httpx.TransportError as error:
            raise ShardUnavailable(f"the shard's owner does not answer: {type(error).__name__}") from error
        except ClientDisconnect:
            raise MalformedRequest("the connection was closed before the end of the body") from None


def stall_seconds(request: Request, ordinary: float) -> float:
    """How long an answer may stand still."""
    return _RELAYED_STALL_S if RELAYED in request.headers else ordinary


def _forwarded(request: Request) -> dict[str, str]:
    return {name: request.headers[name] for name in _FORWARDED if name in request.headers}


async def _problem(answer: httpx.Response) -> ProblemError:
    try:
        problem = ProblemError.from_document(json.loads(await answer.aread()))
    except (ValueError, AttributeError):
        problem = None
    return problem or ShardUnavailable(f"a shard's owner answered {answer.status_code}")


async def _pieces(parts: list[memoryview]) -> AsyncIterator[memoryview]:
    for part in parts:
        for begin in range(0, len(part), _PIECE):
            yield part[begin : begin + _PIECE]


async def _joined(stack: AsyncExitStack, header: bytes, parts: list[_Part], itemsize: int) -> AsyncIterator[bytes]:
    async with stack:
        yield header
        for part in parts:
            async for chunk in part.tensors(part.manifest.numel * itemsize):
                yield chunk


async def _slice(chunks: AsyncIterator[bytes], begin: int, end: int) -> AsyncIterator[bytes]:
    """Bytes `begin` to `end` of what comes."""
    at = 0
    async for chunk in chunks:
        piece = chunk[max(begin - at, 0) : max(end - at, 0)]
        at += len(chunk)
        if piece:
            yield piece
