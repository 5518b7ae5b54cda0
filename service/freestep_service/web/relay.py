"""Requests to the other processes of the service: forwarded to one shard's owner, or made to those of all shards.

This is the slow path, for clients that know one URL only; those that read the topology call the owners themselves.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from urllib.parse import quote_from_bytes, unquote_to_bytes

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from freestep.errors import CoordinatorUnavailable, MalformedRequest, ProblemError, ShardUnavailable
from freestep_service.coordination.run_scripts import not_open
from freestep_service.coordination.secret import SharedSecret
from freestep_service.domain.tokens import Token
from freestep_service.runs.run import Run
from freestep_service.web.body import SLOWEST, stalled
from freestep_service.web.certified import CALLER, caller_line, named_caller
from freestep_service.web.connection import may_stall, wants_head_only
from freestep_service.web.push_traces import relaying
from freestep_service.web.relayed_response import RelayedResponse
from freestep_service.web.waiting import while_connected

__all__ = ["RELAYED", "Relay", "ShardCall", "relay_client"]

RELAYED = "freestep-relayed"
"""The header of a request from another process of the service: a signature of its method and target, and of who has
sent it, if that was told by a certificate.

Such a request is not relayed again, and its answer may stall for longer, since a whole model is sent on shard by shard.
"""
_RELAYED_STALL_S = 600.0
_TIMEOUT_S = 60.0
_READ_S = 660.0
"""Longer than the longest `Prefer: wait`."""
_OPENING_S, _PAUSE_S = 5.0, 0.2
"""Seconds for which a shard that is being opened is asked again, and between two attempts."""
_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailers",
    b"transfer-encoding", b"upgrade", b"host", b"date", b"server",
}  # fmt: skip
_OF_BROWSERS = {b"origin", b"sec-fetch-site"}
"""What this process has judged beside the request's Host, which the owner does not see."""
_PIECE = 256 * 1024


def relay_client(trusted: ssl.SSLContext) -> httpx.AsyncClient:
    """The HTTP client of a Relay."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    timeout = httpx.Timeout(_TIMEOUT_S, connect=5.0, read=_READ_S)
    # There is no proxy between the processes of one service.
    return httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, verify=trusted)


@dataclass(frozen=True)
class ShardCall:
    """A request to every shard of a run, below the run's path; `body(index)` is what a shard's body consists of."""

    method: str
    path: str
    headers: Mapping[str, str]
    query: Mapping[str, str] = field(default_factory=dict)
    body: Callable[[int], Sequence[memoryview]] | None = None


class Relay:
    """HTTP to the owners of shards, this process included.

    secret: what the processes of the service sign their requests with. stall_s: seconds for which a client may read
    nothing of an answer, or send nothing of a body.
    """

    def __init__(self, http: httpx.AsyncClient, secret: SharedSecret, stall_s: float) -> None:
        self._http = http
        self._secret = secret
        self.stall_s = stall_s

    async def is_relayed(self, request: Request) -> bool:
        """Whether the request comes from another process of the service."""
        signature = request.headers.get(RELAYED)
        if signature is None:
            return False
        message = _message(request.method, _target(request), request.headers.get(CALLER))
        return await self._secret.verify(message, signature)

    async def caller(self, request: Request) -> Token | None:
        """Who has sent a relayed request by a certificate, as the process that has let it in says."""
        line = request.headers.get(CALLER)
        return named_caller(line) if line is not None and await self.is_relayed(request) else None

    async def stall_seconds(self, request: Request) -> float:
        """How long the sending of an answer may stall, which its connection is told."""
        if not await self.is_relayed(request):
            return self.stall_s
        may_stall(request.scope, _RELAYED_STALL_S)
        return _RELAYED_STALL_S

    async def forward(
        self, request: Request, run: Run, index: int = 0, content: bytes | None = None, *, is_endless: bool = False
    ) -> Response:
        """The answer of a shard's owner to a request; `content` is the request's body if that has been read already.

        is_endless: whether the answer goes on for as long as it is read; it then ends when the service shuts down.
        Raises ShardUnavailable if the owner cannot be reached, and ClientDisconnect.
        """
        owner = run.owner_url(index)
        if owner is None:
            # Without waiting for the next heartbeat.
            await run.refresh()
            owner = run.owner_url(index)
        if owner is None or await self.is_relayed(request):
            run.shard(index)
            raise ShardUnavailable("the shard has come here in the meantime")
        of_processes = {RELAYED.encode(), CALLER.encode()}
        ignored = _HOP_BY_HOP | _named_in_connection(request) | of_processes | _OF_BROWSERS
        headers = [(name, value) for name, value in request.headers.raw if name not in ignored]
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        made = self._http.build_request(
            "HEAD" if wants_head_only(request.scope) else request.method,
            owner + _target(request).decode(),
            headers=headers,
            content=content or (self._body(request) if has_body else None),
        )
        async with while_connected(
            request.scope, is_waiting=any("wait" in each.lower() for each in request.headers.getlist("prefer"))
        ):
            answer = await self._send(owner, made, request)
        exchanges = AsyncExitStack()
        exchanges.push_async_callback(answer.aclose)
        answered = {name: value for name, value in answer.headers.items() if name.encode() not in _HOP_BY_HOP}
        return RelayedResponse(
            answer.aiter_raw(), answer.status_code, answered, exchanges, self.stall_s, is_endless=is_endless
        )

    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body as it comes; the owner's answer is read behind it. Raises MalformedRequest as Body does.

        Only the time counts in which the client is waited for, and not the owner.
        """
        clock, chunks = asyncio.get_running_loop().time, request.stream()
        left = self.stall_s + int(request.headers.get("content-length", "0")) / SLOWEST
        while True:
            began = clock()
            try:
                async with asyncio.timeout(min(self.stall_s, left)):
                    chunk = await anext(chunks, b"")
            except TimeoutError:
                raise stalled(self.stall_s) from None
            left -= clock() - began
            if not chunk:
                return
            yield chunk

    async def call_all(
        self, exchanges: AsyncExitStack, request: Request, run: Run, call: ShardCall
    ) -> list[httpx.Response]:
        """The answers of all shards' owners, by shard, with their bodies unread; `exchanges` closes them.

        `request` is the one that the calls are made for: they end with its connection. Raises what any owner refuses
        with, ShardUnavailable, and ClientDisconnect.
        """
        if missing := (await run.topology()).missing:
            raise not_open(run.name, missing)
        # The run may be divided anew meanwhile.
        count = run.count

        async def ask(index: int) -> httpx.Response:
            """One shard's answer; while that is being opened the others wait for it."""
            deadline = asyncio.get_running_loop().time() + _OPENING_S
            while True:
                try:
                    return await ask_once(index)
                except ShardUnavailable:
                    if asyncio.get_running_loop().time() > deadline:
                        raise
                    await asyncio.sleep(_PAUSE_S)

        async def ask_once(index: int) -> httpx.Response:
            # The topology is read anew for each attempt, since ownership moves.
            shards = (await run.topology()).shards
            if len(shards) != count:
                raise ShardUnavailable(f"the run has {len(shards)} shards, not {count}", shards=len(shards))
            owner = shards[index].url
            if owner is None:
                raise not_open(run.name, [index])
            # httpx takes text of ASCII only.
            headers = [(name.encode(), value.encode("latin-1")) for name, value in call.headers.items()]
            content = None
            if call.body is not None:
                body = call.body(index)
                headers.append((b"Content-Length", str(sum(map(len, body))).encode()))
                content = _pieces(body)
            made = self._http.build_request(
                call.method,
                f"{owner}/v1/runs/{run.name}/{call.path}",
                params={**call.query, "shard": str(index), "of": str(count)},
                headers=headers,
                content=content,
            )
            answer = await self._send(owner, made, request)
            exchanges.push_async_callback(answer.aclose)
            if not answer.is_success:
                raise await _problem(answer)
            return answer

        async with while_connected(request.scope, is_waiting="Prefer" in call.headers):
            answers = await asyncio.gather(*map(ask, range(count)), return_exceptions=True)
        failures = [each for each in answers if isinstance(each, BaseException)]
        # A refusal before its consequences at the other shards.
        failures.sort(key=lambda error: isinstance(error, ShardUnavailable | CoordinatorUnavailable))
        if failures:
            raise failures[0]
        return [each for each in answers if isinstance(each, httpx.Response)]

    async def _send(self, owner: str, made: httpx.Request, request: Request) -> httpx.Response:
        """Signs and sends a request that is made for another one; the answer, whose body has not been read."""
        made.headers["Accept-Encoding"] = "identity"
        # The owner may be behind a proxy that takes a prefix off.
        target = made.url.raw_path.removeprefix(httpx.URL(owner).raw_path.rstrip(b"/"))
        if (line := caller_line(request)) is not None:
            made.headers[CALLER] = line
        # As the owner's handlers see it.
        method = "GET" if made.method == "HEAD" else made.method
        made.headers[RELAYED] = self._secret.sign(_message(method, target, line))
        try:
            with relaying(request, made.method, str(made.url), made.headers):
                return await self._http.send(made, stream=True)
        except httpx.TransportError as error:
            raise ShardUnavailable(f"the shard's owner does not answer: {type(error).__name__}") from error
        except ClientDisconnect:
            raise MalformedRequest("the connection was closed before the end of the body") from None


def _message(method: str, target: bytes, caller: str | None) -> bytes:
    """What is signed of a request; there is no space in its target."""
    return b" ".join((method.encode(), target, *(() if caller is None else (caller.encode("latin-1"),))))


def _target(request: Request) -> bytes:
    """A request's target, its path made anew of the segments that the router has seen.

    As it was sent it might lead elsewhere: httpx, or a proxy on the way, would resolve dots, encoded or not.
    """
    path: bytes = request.scope["raw_path"]
    query: bytes = request.scope["query_string"]
    encoded = "/".join(_quoted(unquote_to_bytes(segment)) for segment in path.split(b"/")).encode()
    return encoded + (b"?" + query if query else b"")


def _quoted(segment: bytes) -> str:
    """A segment of a path, with all encoded that has a meaning there."""
    quoted = quote_from_bytes(segment, safe="")
    return quoted.replace(".", "%2E") if quoted in (".", "..") else quoted


def _named_in_connection(request: Request) -> set[bytes]:
    """The headers that a request's Connection header names as meant for this hop, RFC 9110, section 7.6.1."""
    names = ",".join(request.headers.getlist("connection"))
    return {name.strip().lower().encode("latin-1") for name in names.split(",")}


async def _pieces(views: Sequence[memoryview]) -> AsyncIterator[bytes]:
    """A body in pieces, since httpx copies what is left of a piece after every partial write."""
    for view in views:
        for begin in range(0, len(view), _PIECE):
            # A memoryview will do; the annotation is httpx's.
            yield view[begin : begin + _PIECE]  # type: ignore[misc]


async def _problem(answer: httpx.Response) -> ProblemError:
    try:
        problem = ProblemError.from_document(json.loads(await answer.aread()))
    except (ValueError, AttributeError):
        problem = None
    return problem or ShardUnavailable(f"a shard's owner answered {answer.status_code}")
