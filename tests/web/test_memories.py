"""Bodies in memory that a client shares: the same answers and refusals as over a connection."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
import safetensors.torch
import torch

from freestep.errors import MemoryNotShared
from freestep_service.state.shared_memory import IS_POSSIBLE, SharedMemory
from harness import ThreadService
from plain_calls import BODY, TENSORS, Api, slug
from shared_bodies import Handed, memory_of

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="there is no such memory on this system")

UNKNOWN = "0" * 32


def test_a_push_and_its_answer_are_those_of_a_connection(api: Api, share: Callable[..., Handed]) -> None:
    handed, other = share(), Api(api.url)
    other.create()
    lease, want = other.lease(), {"Prefer": "return=representation"}
    for step in range(3):
        here, there = handed.push(step, **want), other.push(lease, step, **want)
        assert (here.status_code, there.status_code) == (200, 200)
        mine, its = safetensors.torch.load(handed.body(here)), safetensors.torch.load(there.content)
        assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)
        assert here.headers["Cache-Control"] == "no-store"
        differing = {"cache-control", "content-length", "date", "freestep-span"}
        assert {name: here.headers[name] for name in here.headers if name not in differing} == {
            name: there.headers[name] for name in there.headers if name not in differing
        }
    receipt = handed.push(3)
    assert receipt.json() == {"decision": "applied", "step": 4, "staleness": 0, "replayed": False}
    other.http.delete(other.path())
    other.http.close()


def test_a_body_may_lie_anywhere_among_bodies(api: Api, share: Callable[..., Handed]) -> None:
    handed = share(body=len(BODY) + 100)
    handed.memory[100 : 100 + len(BODY)] = BODY
    headers = handed.headers(100, 100 + len(BODY), 0)
    assert api.http.post(api.path("/gradients"), headers=headers).json()["decision"] == "applied"


def test_a_point_is_pulled(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    for query in ({"point": "x"}, {"point": "y", "dtype": "BF16"}, {"point": "z", "dtype": "I8"}):
        plain = api.http.get(api.path("/parameters"), params=query)
        answer = api.http.get(api.path("/parameters"), params=query, headers=memory_of(handed))
        assert handed.body(answer) == plain.content
        assert answer.headers["ETag"] == plain.headers["ETag"]
    known = {**memory_of(handed), "If-None-Match": plain.headers["ETag"]}
    assert api.http.get(api.path("/parameters"), params=query, headers=known).status_code == 304


def test_what_has_no_room_comes_over_the_connection(api: Api, share: Callable[..., Handed]) -> None:
    handed = share(answer=0)
    answer = handed.push(0, Prefer="return=representation")
    assert "Freestep-Span" not in answer.headers
    assert safetensors.torch.load(answer.content).keys() == TENSORS.keys()


def test_ranges_and_heads_come_over_the_connection(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    part = api.http.get(api.path("/parameters"), headers={**memory_of(handed), "Range": "bytes=0-9"})
    assert (part.status_code, len(part.content)) == (206, 10)
    head = api.http.head(api.path("/parameters"), headers=memory_of(handed))
    assert int(head.headers["Content-Length"]) > 0 and "Freestep-Span" not in head.headers


REFUSED: dict[str, tuple[dict[str, str], str, str | None]] = {
    "ends behind the bodies": ({"Freestep-Span": "0-4097"}, "malformed-request", "Freestep-Span"),
    "lies among answers": ({"Freestep-Span": "9000-9100"}, "malformed-request", "Freestep-Span"),
    "lies nowhere": ({"Freestep-Span": f"0-{10**17}"}, "body-too-large", None),
    "ends before it begins": ({"Freestep-Span": "10-9"}, "malformed-request", "Freestep-Span"),
    "is no span": ({"Freestep-Span": "all"}, "malformed-request", "Freestep-Span"),
    "is empty": ({"Freestep-Span": "0-0"}, "malformed-tensors", None),
    "is short": ({"Freestep-Span": f"0-{len(BODY) - 1}"}, "malformed-tensors", None),
    "is long": ({"Freestep-Span": f"0-{len(BODY) + 1}"}, "malformed-tensors", None),
    "lies in a memory that is not known": ({"Freestep-Memory": UNKNOWN}, "memory-not-shared", None),
    "lies in what is no name": ({"Freestep-Memory": "../x"}, "malformed-request", "Freestep-Memory"),
    "is of another shard": ({"Freestep-Lease": "another"}, "memory-not-shared", None),
    "is of another type": ({"Content-Type": "text/plain"}, "unsupported-media-type", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_is_refused_that(api: Api, service: ThreadService, share: Callable[..., Handed], name: str) -> None:
    changes, problem, field = REFUSED[name]
    handed = share()
    handed.memory[: len(BODY)] = BODY
    before = api.state(service)
    answer = api.http.post(api.path("/gradients"), headers={**handed.headers(0, len(BODY), 0), **changes})
    assert slug(answer) == problem
    assert answer.json().get("field") == field
    assert api.state(service) == before
    assert handed.push(0).json()["decision"] == "applied"


def test_a_span_needs_a_memory_and_no_other_body(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    headers = handed.headers(0, len(BODY), 0)
    twice = api.http.post(api.path("/gradients"), headers=headers, content=BODY)
    assert (slug(twice), twice.json()["field"]) == ("malformed-request", "Freestep-Span")
    del headers["Freestep-Memory"]
    nowhere = api.http.post(api.path("/gradients"), headers=headers)
    assert (slug(nowhere), nowhere.json()["field"]) == ("malformed-request", "Freestep-Span")
    # A memory alone is for the answer: the body comes as ever.
    del headers["Freestep-Span"]
    answer = api.http.post(api.path("/gradients"), headers={**headers, **memory_of(handed)}, content=BODY)
    assert answer.json()["decision"] == "applied"


def test_what_is_wrong_with_a_body_is_what_is_wrong_over_a_connection(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    not_finite = safetensors.torch.save({**TENSORS, "b": torch.tensor(float("nan"))})
    other = safetensors.torch.save({**TENSORS, "b": torch.tensor(7.0)})
    assert slug(handed.push(0, body=not_finite)) == "non-finite-gradient"
    assert slug(handed.push(0, body=b"\xff" * 100)) == "malformed-tensors"
    assert handed.push(0, "once").json()["replayed"] is False
    assert handed.push(0, "once").json()["replayed"] is True
    assert slug(handed.push(0, "once", other)) == "idempotency-conflict"
    # One push, whichever way it comes again.
    assert api.push(handed.lease, 0, "once").json()["replayed"] is True
    assert slug(api.push(handed.lease, 0, "once", body=other)) == "idempotency-conflict"


def test_the_answer_is_counted_as_any(api: Api, share: Callable[..., Handed]) -> None:
    handed = share()
    made = api.http.post(
        "/v1/tokens", json={"name": "t", "scope": "push", "max_bytes_per_minute": len(BODY) + 1}
    ).json()
    with httpx.Client(base_url=api.url, headers={"Authorization": f"Bearer {made['token']}"}) as bound:
        handed.memory[: len(BODY)] = BODY
        headers = handed.headers(0, len(BODY), 0, Prefer="return=representation")
        assert bound.post(api.path("/gradients"), headers=headers).status_code == 200
        refused = bound.post(api.path("/gradients"), headers=handed.headers(0, len(BODY), 1))
        assert (slug(refused), refused.json()["quota"]) == ("overloaded", "bytes_per_minute")


@pytest.mark.parametrize("is_known", [True, False])
def test_a_body_that_was_not_had_is_not_counted(
    api: Api, share: Callable[..., Handed], is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = share()
    made = api.http.post(
        "/v1/tokens", json={"name": "t", "scope": "push", "max_bytes_per_minute": len(BODY) // 2}
    ).json()

    async def take(self: SharedMemory, *_: object) -> str:
        raise MemoryNotShared("another request is using the memory")

    headers = handed.headers(0, len(BODY), 0)
    if is_known:
        monkeypatch.setattr(SharedMemory, "take", take)
    else:
        headers["Freestep-Memory"] = UNKNOWN
    with httpx.Client(base_url=api.url, headers={"Authorization": f"Bearer {made['token']}"}) as bound:
        for _ in range(3):
            assert slug(bound.post(api.path("/gradients"), headers=headers)) == "memory-not-shared"
        # All of it comes over the connection then, and uses the quota up.
        headers = api.headers(handed.lease, 0)
        assert bound.post(api.path("/gradients"), headers=headers, content=BODY).status_code == 200
        assert slug(bound.post(api.path("/gradients"), headers=headers, content=BODY)) == "overloaded"
