"""A key is one push, however often, in whatever company and after whatever delay it is sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from harness import ThreadService
from meanwhile import at_once, under_way, wait_until
from plain_calls import BODY, SGD, TENSORS, Api, slug
from raw_pushes import answered, begun_push, is_pending


def test_the_same_push_again_gives_the_same_receipt_and_moves_nothing(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    first = api.push(lease, 0, "once").json()
    api.push(lease, 1, "twice")
    before = api.state(service)
    for _ in range(3):
        assert api.push(lease, 0, "once").json() == {**first, "replayed": True}
    assert api.state(service) == before


def test_a_replay_may_be_answered_with_fresh_y(api: Api) -> None:
    api.create()
    lease = api.lease()
    api.push(lease, 0, "once")
    api.push(lease, 1)
    answer = api.push(lease, 0, "once", Prefer="return=representation")
    assert answer.headers["Freestep-Replayed"] == "true"
    assert answer.headers["Freestep-Receipt-Step"] == "1"
    assert answer.headers["Freestep-Step"] == "2"
    assert torch.equal(safetensors.torch.load(answer.content)["w"], api.pull("y")[0]["w"])


@pytest.mark.parametrize("change", ["step", "lease", "token", "samples", "body", "length"])
def test_the_same_key_for_another_push_is_a_conflict(api: Api, service: ThreadService, change: str) -> None:
    api.create()
    lease, other = api.lease("one"), api.lease("two")
    api.push(lease, 0, "once")
    before = api.state(service)
    calls: dict[str, Callable[[], httpx.Response]] = {
        "step": lambda: api.push(lease, 1, "once"),
        "lease": lambda: api.push(other, 0, "once"),
        "token": lambda: api.push({**lease, "token": 1}, 0, "once"),
        "samples": lambda: api.push(lease, 0, "once", Freestep_Samples="5"),
        "body": lambda: api.push(lease, 0, "once", tensors={**TENSORS, "b": torch.tensor(2.5)}),
        "length": lambda: api.push(lease, 0, "once", body=BODY + b" "),
    }
    answer = calls[change]()
    assert (answer.status_code, slug(answer)) == (409, "idempotency-conflict")
    assert api.state(service) == before


def test_a_refused_push_does_not_use_up_its_key(api: Api) -> None:
    api.create()
    lease = api.lease()
    assert slug(api.push(lease, 0, "key", body=b"nonsense")) == "malformed-tensors"
    assert api.push(lease, 0, "key").json()["replayed"] is False
    assert api.push(lease, 0, "key").json()["replayed"] is True


def test_a_dropped_push_is_replayed_too(api: Api) -> None:
    api.create(aggregation={"policy": "ringmaster", "max_staleness": 0})
    lease = api.lease()
    api.push(lease, 0)
    dropped = api.push(lease, 0, "late").json()
    assert dropped == {"decision": "dropped", "reason": "stale", "step": 1, "staleness": 1, "replayed": False}
    assert api.push(lease, 0, "late").json() == {**dropped, "replayed": True}
    assert slug(api.push(lease, 1, "late")) == "idempotency-conflict"


def test_an_accumulated_push_is_replayed_as_it_was_or_as_waited_for(api: Api) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease = api.lease()
    accumulated = api.push(lease, 0, "first").json()
    assert (accumulated["decision"], accumulated["step"]) == ("accumulated", 0)
    assert api.push(lease, 0, "second").json()["decision"] == "applied"
    assert api.push(lease, 0, "first").json() == {**accumulated, "replayed": True}
    waited = api.push(lease, 0, "first", Prefer="wait=10").json()
    assert waited == {"decision": "applied", "step": 1, "staleness": 0, "replayed": True}


def test_a_receipt_outlives_its_lease(api: Api) -> None:
    api.create()
    lease = api.lease("me")
    first = api.push(lease, 0, "once").json()
    api.http.delete(api.path(f"/leases/{lease['lease']}"))
    assert api.push(lease, 0, "once").json() == {**first, "replayed": True}
    assert slug(api.push(lease, 0, "never")) == "lease-expired"
    api.lease("me")
    assert api.push(lease, 0, "once").json() == {**first, "replayed": True}


def test_a_lease_remembers_its_newest_pushes(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    for step in range(70):
        api.push(lease, step, f"key-{step}")
    prefix = api.redis_key()
    dump = service.redis_dump(prefix)
    newest = [f"key-{step}" for step in range(6, 70)]
    assert dump[f"{prefix}window:{lease['lease']}"] == newest
    assert set(dump[f"{prefix}receipts"]) == {"", *newest}
    assert api.push(lease, 6, "key-6").json()["replayed"] is True


def test_two_at_once_apply_once(api: Api, service: ThreadService, connect: Callable[..., Api]) -> None:
    api.create()
    lease = api.lease()
    callers = [connect(service.url, api.run) for _ in range(4)]
    for step in range(20):
        pushes = [partial(caller.push, lease, step, f"key-{step}") for caller in callers]
        answers = [answer.json() for answer in at_once(*pushes)]
        assert {answer["step"] for answer in answers} == {step + 1}
        assert sorted(answer["replayed"] for answer in answers) == [False, True, True, True]
    assert api.status()["step"] == 20


def test_many_senders_of_many_keys_apply_each_once(
    api: Api, service: ThreadService, connect: Callable[..., Api]
) -> None:
    api.create(optimizer=SGD)
    lease = api.lease()
    keys = [f"key-{number}" for number in range(40)]
    receipts: list[tuple[str, dict[str, Any]]] = []

    def send(caller: Api, first: int) -> None:
        for key in keys[first:] + keys[:first]:
            receipts.append((key, caller.push(lease, 0, key, tensors={**TENSORS, "b": torch.tensor(-1.0)}).json()))

    # Pairs of threads go through the keys side by side, and the pairs one after the other.
    callers = [connect(service.url, api.run) for _ in range(8)]
    at_once(*(partial(send, caller, number // 2 * 10) for number, caller in enumerate(callers)))
    assert api.status()["step"] == len(keys)
    assert api.pull("y")[0]["b"] == TENSORS["b"] + len(keys)
    for key in keys:
        mine = [receipt for each, receipt in receipts if each == key]
        assert len({receipt["step"] for receipt in mine}) == 1
        assert sorted(receipt["replayed"] for receipt in mine) == [False] + [True] * 7


def test_a_receipt_is_kept_for_who_left_before_the_answer(api: Api) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease = api.lease()
    with begun_push(api, lease, BODY, "once", Prefer="wait=60"):
        wait_until(lambda: api.status()["pushes"]["accumulated"] == 1)
    receipt = {"decision": "accumulated", "step": 0, "staleness": 0, "replayed": True}
    assert [api.push(lease, 0, "once").json() for _ in range(2)] == [receipt] * 2
    assert api.push(lease, 0, "other").json()["step"] == 1


@pytest.mark.parametrize("end", ["finished", "cut"])
def test_a_retry_waits_for_the_upload_before_it(
    api: Api, service: ThreadService, connect: Callable[..., Api], end: str
) -> None:
    api.create()
    lease = api.lease()
    pushes = service.registry.get(api.run).shard(0)._pushes
    with begun_push(api, lease, BODY[:-1], "once") as first:
        wait_until(lambda: is_pending(service, api, "once"))
        retry = under_way(partial(connect(service.url, api.run).push, lease, 0, "once"))
        wait_until(lambda: bool(pushes._flights["once"].landed._waiters))
        assert api.status()["step"] == 0
        other = api.push(lease, 0, "once", Freestep_Samples="2")
        assert (other.status_code, slug(other)) == (409, "idempotency-conflict")
        if end == "finished":
            first.sendall(BODY[-1:])
            assert b'"replayed":false' in answered(first)
    assert retry.result().json() == {"decision": "applied", "step": 1, "staleness": 0, "replayed": end == "finished"}
    assert api.status()["step"] == 1


def test_a_retry_waits_for_the_update_as_its_first_send_did(
    api: Api, service: ThreadService, connect: Callable[..., Api]
) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease = api.lease()
    api.push(lease, 0, "first")
    writer = service.registry.get(api.run).shard(0).core.writer
    callers = [connect(service.url, api.run) for _ in range(2)]
    retries = [under_way(partial(caller.push, lease, 0, "first", Prefer="wait=60")) for caller in callers]
    wait_until(lambda: len(writer._waiters) == 2)
    receipts = [api.push(lease, 0, "second").json(), *(each.result().json() for each in retries)]
    assert {(receipt["decision"], receipt["step"]) for receipt in receipts} == {("applied", 1)}
    assert sorted(receipt["replayed"] for receipt in receipts) == [False, True, True]
