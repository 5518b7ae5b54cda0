"""Requests to the other processes of a service, without a network: what they carry, and what their answers become."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from starlette.requests import Request

from asgi_calls import Answer, Sender, request_of, scope_of
from fake_transport import FakeTransport
from freestep.errors import LeaseExpired, MalformedRequest, ShardUnavailable
from freestep_service.web import relay as relays
from freestep_service.web.connection import CONNECTION, HEAD_ONLY
from freestep_service.web.error_boundary import ErrorBoundary
from freestep_service.web.relay import RELAYED, ShardCall
from relayed import OWNERS, Body, Owner, ShardedRun, answered, problem, relay_to, shard_of


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is being opened is asked again without a pause, and given up soon."""
    monkeypatch.setattr(relays, "_PAUSE_S", 0.0)
    monkeypatch.setattr(relays, "_OPENING_S", 0.02)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


def forwarded(owner: Owner, scope: Any, index: int = 0, *chunks: bytes, content: bytes | None = None) -> Answer:
    """The answer to a request that is forwarded to a shard's owner."""
    answer = Answer()

    async def work() -> None:
        sender = Sender(chunks)
        request = Request(scope, sender.receive)
        response = await relay_to(owner).forward(request, ShardedRun(), index, content)  # type: ignore[arg-type]
        await response(scope, sender.receive, answer.send)

    run(work)
    return answer


def test_a_request_is_forwarded_as_it_came() -> None:
    seen: list[tuple[httpx.Request, bytes]] = []
    body = Body(b"an", b"swer")

    async def owner(request: httpx.Request) -> httpx.Response:
        seen.append((request, await request.aread()))
        headers = {"Freestep-Step": "7", "Content-Length": "6", "Connection": "close", "Date": "today"}
        return httpx.Response(201, headers=headers, stream=body)

    headers = {"Freestep-Lease": "l", "Content-Length": "6", "Connection": "keep-alive", "Host": "here", RELAYED: "1"}
    target = "/v1/runs/run/leases/a%2Fb%3F?shard=0&of=2"
    answer = forwarded(owner, scope_of("PUT", target, headers), 0, b"bo", b"dy!!")
    ((request, sent),) = seen
    assert (request.method, str(request.url), sent) == ("PUT", OWNERS[0] + target, b"body!!")
    assert request.headers["Freestep-Lease"] == "l"
    assert request.headers["Host"] == "one:8000"
    assert request.headers.get_list(RELAYED) == [f"signed PUT {target}"]
    assert (answer.status, answer.body, answer.is_complete) == (201, b"answer", True)
    assert answer.headers == {"freestep-step": "7", "content-length": "6"}
    assert body.is_closed


def test_of_head_the_owner_sends_no_body() -> None:
    seen: list[httpx.Request] = []

    async def owner(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answered(status=204)

    target = "/v1/runs/run/parameters"
    forwarded(owner, scope_of("GET", target, extensions={HEAD_ONLY: {}}))
    assert seen[0].method == "HEAD"
    found: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(await relay_to(no_owner).is_relayed(Request(scope)))

    async def work() -> None:
        scope = scope_of("HEAD", target, {RELAYED: seen[0].headers[RELAYED]})
        await ErrorBoundary(app, lambda _: None)(scope, Sender(()).receive, Answer().send)

    run(work)
    assert found == [True]


def test_a_body_that_was_read_is_forwarded_too() -> None:
    async def owner(request: httpx.Request) -> httpx.Response:
        return answered(await request.aread())

    scope = scope_of("POST", "/v1/runs/run/leases", {"Content-Length": "2"})
    assert forwarded(owner, scope, content=b"{}").body == b"{}"


def test_an_owner_behind_a_proxy_sees_its_own_path_signed() -> None:
    seen: list[httpx.Request] = []

    async def owner(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answered(status=204)

    assert forwarded(owner, scope_of("GET", "/v1/runs/run/parameters?a=b"), 1).status == 204
    assert str(seen[0].url) == "https://two/behind/a/proxy/v1/runs/run/parameters?a=b"
    assert seen[0].headers[RELAYED] == "signed GET /v1/runs/run/parameters?a=b"


def test_headers_of_one_hop_are_not_forwarded() -> None:
    seen: list[httpx.Request] = []

    async def owner(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answered(status=204)

    headers = {"Connection": "keep-alive, X-Hop ,freestep-lease", "X-Hop": "1", "Freestep-Lease": "l", "X-End": "2"}
    forwarded(owner, scope_of("GET", "/v1/runs/run", headers))
    assert "X-Hop" not in seen[0].headers and "Freestep-Lease" not in seen[0].headers
    assert seen[0].headers["X-End"] == "2"


@pytest.mark.parametrize("segment", ["..", ".", "%2e%2e", ".%2E", "%2e"])
def test_a_lease_of_dots_is_not_the_run(segment: str) -> None:
    seen: list[httpx.Request] = []

    async def owner(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answered(status=204)

    forwarded(owner, scope_of("DELETE", f"/v1/runs/run/leases/{segment}"))
    target = f"/v1/runs/run/leases/{unquote(segment).replace('.', '%2E')}"
    assert seen[0].url.raw_path.decode() == target
    received = request_of("DELETE", target, {RELAYED: seen[0].headers[RELAYED]})

    async def work() -> None:
        assert await relay_to(owner).is_relayed(received)

    run(work)


async def no_owner(request: httpx.Request) -> httpx.Response:
    raise AssertionError("no owner is to be asked")


def test_a_request_is_relayed_once() -> None:
    async def work() -> None:
        target = "/v1/runs/run/parameters?shard=0"
        request = request_of("GET", target, {RELAYED: f"signed GET {target}"})
        with pytest.raises(ShardUnavailable, match="no shard is here"):
            await relay_to(no_owner).forward(request, ShardedRun(), 0)  # type: ignore[arg-type]

    run(work)


@pytest.mark.parametrize("signature", ["1", "", "signed GET /v1/runs/run/parameters?shard=1", "signed PUT /"])
def test_a_forged_header_is_ignored(signature: str) -> None:
    async def owner(request: httpx.Request) -> httpx.Response:
        assert request.headers.get_list(RELAYED) == ["signed GET /v1/runs/run/parameters?shard=0"]
        return answered(status=204)

    scope = scope_of("GET", "/v1/runs/run/parameters?shard=0", {RELAYED: signature})
    assert forwarded(owner, scope).status == 204


@pytest.mark.parametrize(("signature", "seconds"), [(None, 5.0), ("1", 5.0), ("signed GET /a", 600.0)])
def test_only_what_is_relayed_may_stall_for_long(signature: str | None, seconds: float) -> None:
    async def work() -> None:
        request = request_of("GET", "/a", {} if signature is None else {RELAYED: signature})
        assert await relay_to(no_owner, stall_s=5.0).stall_seconds(request) == seconds

    run(work)


def test_a_shard_without_an_owner_is_looked_for_once_more() -> None:
    async def work() -> None:
        unowned = ShardedRun(owners=[None])
        with pytest.raises(ShardUnavailable):
            await relay_to(no_owner).forward(request_of("GET", "/a"), unowned, 0)  # type: ignore[arg-type]
        assert unowned.heartbeats == 1

    run(work)


@pytest.mark.parametrize("error", [httpx.ConnectError("x"), httpx.ReadTimeout("x"), httpx.RemoteProtocolError("x")])
def test_an_owner_that_does_not_answer(error: Exception) -> None:
    async def owner(request: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(ShardUnavailable, match=type(error).__name__):
        forwarded(owner, scope_of("GET", "/a"))


def test_a_body_that_ends_with_its_connection() -> None:
    class Leaving(Sender):
        async def receive(self) -> dict[str, Any]:
            return await super().receive() if not self.sent else {"type": "http.disconnect"}

    async def owner(request: httpx.Request) -> httpx.Response:
        await request.aread()
        return httpx.Response(200)

    async def work() -> None:
        request = Request(scope_of("POST", "/a", {"Content-Length": "9"}), Leaving([b"half"]).receive)
        with pytest.raises(MalformedRequest):
            await relay_to(owner).forward(request, ShardedRun(), 0)  # type: ignore[arg-type]

    run(work)


@pytest.mark.parametrize(
    ("prefer", "ends"), [("wait=600", ["eof", "loss", "shutdown"]), ("return=representation", ["loss"])]
)
def test_a_request_is_given_up_when_its_client_is_gone(prefer: str, ends: list[str]) -> None:
    async def work(end: str) -> None:
        given_up: list[bool] = []

        async def owner(request: httpx.Request) -> httpx.Response:
            try:
                return await asyncio.Event().wait()  # type: ignore[return-value]
            finally:
                given_up.append(True)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            request = Request(scope, receive)
            response = await relay_to(owner).forward(request, ShardedRun(), 0)  # type: ignore[arg-type]
            await response(scope, receive, send)

        refused: list[Exception] = []

        async def answering(scope: Any, receive: Any, send: Any) -> None:
            try:
                await app(scope, receive, send)
            except ShardUnavailable as error:
                refused.append(error)
                await send({"type": "http.response.start", "status": 503, "headers": []})
                await send({"type": "http.response.body"})

        transport = FakeTransport(ErrorBoundary(answering, lambda _: None))
        transport.feed(f"GET /a HTTP/1.1\r\nHost: here\r\nPrefer: {prefer}\r\n\r\n".encode())
        await transport.turn()
        assert not given_up
        if end == "eof":
            transport.feed_eof()
        elif end == "loss":
            transport.lose()
        else:
            transport.connection.shutdown()
        await transport.turn()
        assert given_up == [True]
        assert len(refused) == (end != "loss")

    for end in ends:
        run(lambda end=end: work(end))  # type: ignore[misc]


# Answers that other processes send


def relaying(body: Body, stall_s: float = 30.0) -> tuple[Callable[..., Awaitable[None]], Body]:
    async def owner(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Length": "300000"}, stream=body)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        response = await relay_to(owner, stall_s).forward(request, ShardedRun(), 0)  # type: ignore[arg-type]
        await response(scope, receive, send)

    return app, body


def test_an_owner_that_stops_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    app, body = relaying(Body(b"half", error=httpx.ReadError("gone")))

    async def work() -> None:
        transport = FakeTransport(ErrorBoundary(app, lambda _: None))
        transport.feed(b"GET /a HTTP/1.1\r\nHost: here\r\n\r\n")
        await transport.turn()
        assert transport.is_aborted
        assert transport.written.endswith(b"half")

    run(work)
    assert body.is_closed
    (record,) = [each for each in caplog.records if each.name == "freestep"]
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)


def test_a_client_that_reads_nothing_ends_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    app, body = relaying(Body(*[bytes(100_000)] * 3), stall_s=0.01)

    async def work() -> None:
        ended = asyncio.Event()

        async def noted(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            ended.set()

        transport = FakeTransport(ErrorBoundary(noted, lambda _: None), reads=0)
        transport.feed(b"GET /a HTTP/1.1\r\nHost: here\r\n\r\n")
        await ended.wait()
        assert transport.is_aborted

    run(work)
    assert body.is_closed
    assert len([each for each in caplog.records if each.name == "freestep"]) == 1


def test_a_client_that_leaves_ends_the_owners_answer(caplog: pytest.LogCaptureFixture) -> None:
    app, body = relaying(Body(*[bytes(100_000)] * 3))

    async def work() -> None:
        transport = FakeTransport(ErrorBoundary(app, lambda _: None), reads=0)
        transport.feed(b"GET /a HTTP/1.1\r\nHost: here\r\n\r\n")
        await transport.turn()
        assert not body.is_closed
        transport.lose()
        await transport.turn()
        assert body.is_closed

    run(work)
    assert not [each for each in caplog.records if each.name == "freestep"]


def test_an_owner_that_stops_under_another_server() -> None:
    with pytest.raises(httpx.ReadError):
        forwarded(lambda request: _stopping(), scope_of("GET", "/a"))


async def _stopping() -> httpx.Response:
    return httpx.Response(200, stream=Body(b"half", error=httpx.ReadError("gone")))


# Calls to all shards


def asked(owner: Owner, call: ShardCall, sharded: ShardedRun | None = None, **scope: Any) -> list[bytes]:
    """The bodies of all owners' answers; these are closed, whatever comes of them."""
    contents: list[bytes] = []

    async def work() -> None:
        async with AsyncExitStack() as exchanges:
            request = request_of("GET", "/a", **scope)
            answers = await relay_to(owner).call_all(exchanges, request, sharded or ShardedRun(), call)  # type: ignore[arg-type]
            contents.extend([await answer.aread() for answer in answers])

    run(work)
    return contents


def test_every_owner_is_asked_for_its_part() -> None:
    async def owner(request: httpx.Request) -> httpx.Response:
        index = shard_of(request)
        assert str(request.url).startswith(f"{OWNERS[index]}/v1/runs/run/gradients?")
        assert request.url.params["more"] == "x"
        assert request.headers["Idempotency-Key"] == "key"
        sent = await request.aread()
        assert request.headers["Content-Length"] == str(len(sent))
        assert "Transfer-Encoding" not in request.headers
        return answered(b"%d %b" % (index, sent))

    call = ShardCall(
        "POST",
        "gradients",
        {"Idempotency-Key": "key"},
        {"more": "x"},
        lambda index: [memoryview(b"part "), memoryview(str(index).encode())],
    )
    assert asked(owner, call) == [b"0 part 0", b"1 part 1"]


PULL = ShardCall("GET", "parameters", {})


def test_a_run_that_lacks_owners_is_not_asked() -> None:
    with pytest.raises(ShardUnavailable) as refused:
        asked(no_owner, PULL, ShardedRun(owners=[OWNERS[0], None]))
    assert refused.value.extensions["missing"] == [1]


def test_a_shard_that_moves_is_asked_at_its_new_owner() -> None:
    sharded = ShardedRun()

    async def owner(request: httpx.Request) -> httpx.Response:
        if request.url.host == "two":
            sharded.owners[1] = "http://three"
            return problem("shard-unavailable", 503)
        return answered(request.url.host.encode())

    assert asked(owner, PULL, sharded) == [b"one", b"three"]


@pytest.mark.parametrize("owners", [OWNERS[:1], (*OWNERS, "http://three")])
def test_a_run_that_was_divided_anew_is_not_asked_for_other_parts(owners: tuple[str, ...]) -> None:
    class Divided(ShardedRun):
        """A run of two shards, as far as this process knows."""

        async def topology(self) -> Any:
            return await ShardedRun(list(owners)).topology()

    with pytest.raises(ShardUnavailable) as refused:
        asked(no_owner, PULL, Divided())
    assert refused.value.extensions["shards"] == len(owners)


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_refusal_is_raised_before_its_consequences(refusing: int) -> None:
    async def owner(request: httpx.Request) -> httpx.Response:
        if shard_of(request) == refusing:
            return problem("lease-expired", 410)
        raise httpx.ConnectError("refused")

    with pytest.raises(LeaseExpired):
        asked(owner, PULL)


@pytest.mark.parametrize("content", [b"", b"[]", b"no document", b'{"type": "urn:freestep:problem:unheard-of"}'])
def test_an_answer_that_is_no_problem_document(content: bytes) -> None:
    async def owner(request: httpx.Request) -> httpx.Response:
        return answered(content, 500)

    with pytest.raises(ShardUnavailable, match="answered 500"):
        asked(owner, PULL)


def test_answers_to_a_refused_call_are_closed() -> None:
    bodies: list[Body] = []

    async def owner(request: httpx.Request) -> httpx.Response:
        if shard_of(request) == 1:
            return problem("lease-expired", 410)
        bodies.append(Body(b"unread"))
        return httpx.Response(200, stream=bodies[-1])

    with pytest.raises(LeaseExpired):
        asked(owner, PULL)
    assert [body.is_closed for body in bodies] == [True]


def test_calls_end_with_the_connection_that_they_are_made_for() -> None:
    given_up: list[int] = []

    async def owner(request: httpx.Request) -> httpx.Response:
        try:
            return await asyncio.Event().wait()  # type: ignore[return-value]
        finally:
            given_up.append(shard_of(request))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert CONNECTION in scope["extensions"]
        async with AsyncExitStack() as exchanges:
            await relay_to(owner).call_all(exchanges, Request(scope, receive), ShardedRun(), PULL)  # type: ignore[arg-type]

    async def work() -> None:
        transport = FakeTransport(ErrorBoundary(app, lambda _: None))
        transport.feed(b"GET /a HTTP/1.1\r\nHost: here\r\n\r\n")
        await transport.turn()
        transport.lose()
        await transport.turn()
        assert sorted(given_up) == [0, 1]

    run(work)
