"""Whole models of shards that are elsewhere, without a network: joined from their parts, and split into them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from starlette.responses import Response

from asgi_calls import Answer, Sender, request_of
from freestep.errors import LeaseExpired, ShardUnavailable
from freestep.wire.header import encode_header
from freestep_service.web.whole_models import initialize_whole, pull_whole, push_whole
from relayed import MANIFEST, Body, Owner, ShardedRun, answered, problem, relay_to, shard_of

WHOLE = torch.arange(7, dtype=torch.float32)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


class Owners:
    """The owners of two shards, which answer with their parts of WHOLE; `steps` are those of their answers in turn."""

    def __init__(self, *steps: tuple[int, int]) -> None:
        self.steps = list(steps)
        self.requests: list[list[httpx.Request]] = [[], []]
        self.bodies: list[Body] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        index = shard_of(request)
        self.requests[index].append(request)
        attempt = len(self.requests[index]) - 1
        part = MANIFEST.part(index, 2)
        data = WHOLE[part.begin : part.end].numpy().tobytes()
        # In pieces that are cut within the header and within an element.
        body = encode_header(part, "F32") + data
        self.bodies.append(Body(body[:5], body[5:-3], body[-3:]))
        headers = {"Freestep-Epoch": "2", "Freestep-Step": str(self.steps[min(attempt, len(self.steps) - 1)][index])}
        headers |= {"Freestep-Cut": "30", "Content-Length": str(len(body))}
        return httpx.Response(200, headers=headers, stream=self.bodies[-1])


def pulled(owners: Owner, headers: dict[str, str] | None = None, **more: Any) -> Answer:
    """The answer to a pull of the whole of y."""
    answer = Answer()

    async def work() -> None:
        request = request_of("GET", "/v1/runs/run/parameters?point=y", headers)
        response = await pull_whole(relay_to(owners), request, ShardedRun(), "y", "F32", 5, **more)  # type: ignore[arg-type]
        await response(request.scope, Sender(()).receive, answer.send)

    run(work)
    return answer


def test_a_whole_point_is_joined_from_its_parts() -> None:
    owners = Owners((7, 7))
    answer = pulled(owners, {"Freestep-Lease": "l"}, prefer="wait=30", lines={"Of-Receipt": "yes"})
    tensors = safetensors.torch.load(answer.body)
    assert torch.equal(torch.cat([tensors["w"], tensors["b"]]), WHOLE)
    assert answer.status == 200
    assert answer.headers["content-length"] == str(len(answer.body))
    assert answer.headers["etag"] == '"e2-s7-y-F32"'
    assert {answer.headers[name] for name in ("freestep-epoch", "freestep-step", "freestep-cut")} == {"2", "7", "30"}
    assert answer.headers["of-receipt"] == "yes"
    for (request,) in owners.requests:
        assert {request.url.params[name] for name in ("point", "dtype", "min_step")} == {"y", "F32", "5"}
        assert (request.headers["Prefer"], request.headers["Freestep-Lease"]) == ("wait=30", "l")
    (one,), (other,) = owners.requests
    assert one.url.params["cut"] == other.url.params["cut"]
    assert all(body.is_closed for body in owners.bodies)


@pytest.mark.parametrize("begin", [0, 3, 50, 100, 130, 150])
@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_any_range_of_a_whole_point(begin: int, size: int) -> None:
    whole = pulled(Owners((7, 7))).body
    answer = pulled(Owners((7, 7)), {"Range": f"bytes={begin}-{begin + size - 1}"})
    assert (answer.status, answer.body) == (206, whole[begin : begin + size])
    end = min(begin + size, len(whole))
    assert answer.headers["content-range"] == f"bytes {begin}-{end - 1}/{len(whole)}"


def test_nothing_is_read_behind_a_range_of_a_whole_point() -> None:
    owners = Owners((7, 7))
    size = len(encode_header(MANIFEST.part(0, 2), "F32"))
    assert pulled(owners, {"Range": f"bytes=0-{size}"}).status == 206
    assert [body.read for body in owners.bodies] == [0, 0]
    assert all(body.is_closed for body in owners.bodies)


def test_parts_of_different_steps_are_asked_for_again() -> None:
    owners = Owners((7, 8), (8, 9), (9, 9))
    assert pulled(owners).headers["freestep-step"] == "9"
    cuts = [request.url.params["cut"] for request in owners.requests[0]]
    assert len(set(cuts)) == 3
    assert all(body.is_closed for body in owners.bodies)


def test_shards_that_never_agree_are_given_up() -> None:
    owners = Owners((7, 8))
    with pytest.raises(ShardUnavailable):
        pulled(owners)
    assert all(body.is_closed for body in owners.bodies)


def test_a_whole_point_that_is_known_is_not_sent() -> None:
    owners = Owners((7, 7))
    answer = pulled(owners, {"If-None-Match": '"e2-s7-y-F32"'})
    assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", '"e2-s7-y-F32"')
    assert all(body.is_closed for body in owners.bodies)


def test_the_parts_are_asked_for_with_the_headers_of_the_whole() -> None:
    headers = {"Authorization": "Bearer t\xa0", "Freestep-Session": "8000.x", "Cookie": "freestep-8000=y"}
    owners = Owners((7, 7))
    assert pulled(owners, headers, prefer="w\xe4it, wait=1").status == 200
    for (request,) in owners.requests:
        found = {name.lower(): value for name, value in request.headers.raw}
        assert found[b"prefer"] == b"w\xe4it, wait=1"
        assert [found[name.lower().encode()].decode("latin-1") for name in headers] == list(headers.values())


def test_a_refusal_of_a_part_is_one_of_the_whole() -> None:
    async def owner(request: httpx.Request) -> httpx.Response:
        return problem("lease-expired", 410)

    with pytest.raises(LeaseExpired):
        pulled(owner)


class Receivers:
    """The owners of two shards, which keep what they are sent."""

    def __init__(self, *decisions: str) -> None:
        self.parts: dict[int, torch.Tensor] = {}
        self.requests: list[httpx.Request] = []
        self._decisions = decisions

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        index = shard_of(request)
        self.requests.append(request)
        tensors = safetensors.torch.load(await request.aread())
        self.parts[index] = torch.cat([tensors[slot.name].reshape(-1) for slot in MANIFEST.part(index, 2).slots])
        receipt = b'{"decision": "%b", "step": %d, "staleness": 0, "replayed": %b}'
        decision = self._decisions[index] if self._decisions else "applied"
        return answered(receipt % (decision.encode(), 7 + index, b"true" if index else b"false"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_gradient_is_split_into_parts(dtype: torch.dtype) -> None:
    receivers = Receivers("accumulated", "applied")

    async def work() -> None:
        request = request_of("POST", "/a", {"Freestep-Lease": "l", "Freestep-Step": "6", "Other": "x"})
        headers = {"Idempotency-Key": "key"}
        receipt = await push_whole(relay_to(receivers), request, ShardedRun(), WHOLE.to(dtype), headers)  # type: ignore[arg-type]
        assert (receipt.decision, receipt.step, receipt.replayed) == ("applied", 8, False)

    run(work)
    assert torch.equal(torch.cat([receivers.parts[0], receivers.parts[1]]), WHOLE.to(dtype))
    for request in receivers.requests:
        assert (request.method, request.url.path.rpartition("/")[2]) == ("POST", "gradients")
        assert (request.headers["Freestep-Lease"], request.headers["Freestep-Step"]) == ("l", "6")
        assert request.headers["Idempotency-Key"] == "key"
        assert "Other" not in request.headers


def test_whole_weights_are_one_upload() -> None:
    receivers = Receivers()

    async def work() -> None:
        await initialize_whole(relay_to(receivers), request_of("PUT", "/a"), ShardedRun(), WHOLE, "key")  # type: ignore[arg-type]

    run(work)
    one, other = receivers.requests
    assert one.headers["Idempotency-Key"] == other.headers["Idempotency-Key"] == "key"
    assert {one.method, other.method} == {"PUT"}
    assert torch.equal(torch.cat([receivers.parts[0], receivers.parts[1]]), WHOLE)


def test_an_answer_that_cannot_be_sent_closes_its_parts() -> None:
    owners = Owners((7, 7))

    async def failing_send(message: Any) -> None:
        raise RuntimeError("the server failed")

    async def work() -> None:
        request = request_of("GET", "/a")
        response: Response = await pull_whole(relay_to(owners), request, ShardedRun(), "y", "F32", 0)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError):
            await response(request.scope, Sender(()).receive, failing_send)

    run(work)
    assert all(body.is_closed for body in owners.bodies)
