"""Requests that wait (`Prefer: wait=S`): they end with their clients, and hold up no shutdown."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Callable

import safetensors.torch
import torch

from freestep.wire.receiver import MEDIA_TYPE
from harness import OWN_HEAD, ProcessService, ThreadService
from meanwhile import under_way, wait_until
from plain_calls import BODY, Api, slug
from raw_pushes import connected, head_of_a_push

WAIT = {"Prefer": "wait=600"}


def test_a_pull_that_waits_ends_with_its_client(api: Api, service: ThreadService) -> None:
    api.create()
    writer = service.registry.get(api.run).shard(0).core.writer
    for _ in range(3):
        with connected(api.url) as connection:
            head = f"GET {api.path('/parameters')}?min_step=5 HTTP/1.1\r\n{OWN_HEAD}Prefer: wait=600\r\n\r\n"
            connection.sendall(head.encode())
            wait_until(lambda: bool(writer._waiters))
        wait_until(lambda: not writer._waiters)


def test_a_pull_that_waits_longer_than_its_token_is_good_is_refused(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    token = api.http.post("/v1/tokens", json={"name": "reader", "scope": "read"}).json()
    writer = service.registry.get(api.run).shard(0).core.writer
    headers = {**WAIT, "Authorization": f"Bearer {token['token']}"}
    waiting = under_way(lambda: api.http.get(api.path("/parameters"), params={"min_step": 1}, headers=headers))
    wait_until(lambda: bool(writer._waiters))
    assert api.http.delete(f"/v1/tokens/{token['id']}").status_code == 204
    assert api.push(lease, 0).status_code == 200
    answer = waiting.result(60)
    assert (answer.status_code, slug(answer), answer.json()["scope"]) == (401, "unauthenticated", "read")


def test_a_push_that_waits_ends_with_its_client_and_counts(api: Api, service: ThreadService) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease = api.lease()
    writer = service.registry.get(api.run).shard(0).core.writer
    with connected(api.url) as connection:
        connection.sendall(head_of_a_push(api.path("/gradients"), api.headers(lease, 0, "one", **WAIT)) + BODY)
        wait_until(lambda: bool(writer._waiters))
    wait_until(lambda: not writer._waiters)
    assert api.push(lease, 0, "two").json()["decision"] == "applied"
    assert api.push(lease, 0, "one").json() == {
        "decision": "accumulated",
        "step": 0,
        "staleness": 0,
        "replayed": True,
    }


def test_a_large_push_that_waits_ends_with_its_client(api: Api, service: ThreadService) -> None:
    numel = 100_000
    parameters = [{"name": "w", "shape": [numel]}]
    spec = api.spec(parameters=parameters, aggregation={"policy": "buffered", "batch": 2})
    body = safetensors.torch.save({"w": torch.ones(numel)})
    assert api.http.put(api.path(), json=spec).status_code == 201
    assert api.initialize({"w": torch.zeros(numel)}).status_code == 201
    lease = api.lease()
    writer = service.registry.get(api.run).shard(0).core.writer
    with connected(api.url) as connection:
        head = head_of_a_push(api.path("/gradients"), api.headers(lease, 0, "one", **WAIT), len(body))
        connection.sendall(head + body)
        wait_until(lambda: bool(writer._waiters))
    wait_until(lambda: not writer._waiters)
    assert api.push(lease, 0, "two", body=body).json()["decision"] == "applied"


def test_a_shutdown_answers_those_who_wait(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process()
    api = connect(service.url, f"run-{uuid.uuid4().hex[:8]}")
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease, others = api.lease(), [connect(service.url, api.run) for _ in range(2)]
    pull = under_way(lambda: others[0].http.get(api.path("/parameters"), params={"min_step": 5}, headers=WAIT))
    push = under_way(lambda: others[1].push(lease, 0, "one", **WAIT))
    wait_until(lambda: api.status()["pushes"]["accumulated"] == 1)
    service.send_signal(signal.SIGTERM)
    for answer in (pull.result(60), push.result(60)):
        assert (answer.status_code, slug(answer)) == (503, "shard-unavailable")
        assert answer.json()["detail"] == "the service is shutting down"
        assert int(answer.headers["Retry-After"]) > 0
    assert service.process is not None
    service.process.join(60)
    assert not service.process.is_alive()


def test_of_what_was_pushed_before_a_shutdown_a_retry_gets_the_receipt(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process()
    api = connect(service.url, f"run-{uuid.uuid4().hex[:8]}")
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease, other = api.lease(), connect(service.url, api.run)
    push = under_way(lambda: other.push(lease, 0, "one", **WAIT))
    wait_until(lambda: api.status()["pushes"]["accumulated"] == 1)
    service.send_signal(signal.SIGTERM)
    assert slug(push.result(60)) == "shard-unavailable"
    assert service.process is not None
    service.process.join(60)
    service.start()
    headers = {**api.headers(lease, 0, "one"), "Content-Type": MEDIA_TYPE}
    retried = api.http.post(api.path("/gradients"), content=BODY, headers=headers)
    # The lease is of the store that has ended with the service, and may be gone.
    assert retried.status_code in (200, 409, 410)
    if retried.status_code == 200:
        assert retried.json()["replayed"] is True
