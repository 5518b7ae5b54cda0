"""Requests that were let in, and have come when their tokens have ended: they count for nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from freestep.wire.receiver import MEDIA_TYPE
from harness import ThreadService
from meanwhile import under_way, wait_until
from plain_calls import BODY, TENSORS, Api, ShardedApi, slug
from raw_pushes import begun
from states import export, train


@dataclass
class Held:
    """A token, which can be ended."""

    api: Api
    id: str
    headers: dict[str, str]

    @classmethod
    def of(cls, api: Api, scope: str) -> Held:
        made = api.http.post("/v1/tokens", json={"name": "test", "scope": scope}).json()
        return cls(api, made["id"], {"Authorization": f"Bearer {made['token']}"})

    def end(self) -> None:
        assert self.api.http.delete(f"/v1/tokens/{self.id}").status_code == 204


def is_refused(answer: tuple[int, dict[str, Any]], scope: str) -> bool:
    status, document = answer
    return (status, document["type"].rpartition(":")[2], document["scope"]) == (401, "unauthenticated", scope)


def test_initial_weights(api: Api) -> None:
    assert api.http.put(api.path(), json=api.spec()).status_code == 201
    token = Held.of(api, "push")
    headers = {"Content-Type": MEDIA_TYPE, **token.headers}
    with begun(api.url, "PUT", api.path("/parameters"), len(BODY), headers) as send:
        token.end()
        assert is_refused(send(BODY), "push")
    assert not api.status()["initialized"]
    assert api.initialize().status_code == 201


@pytest.mark.parametrize("inline", [0, 100])
def test_a_push(start_service: Callable[..., ThreadService], connect: Callable[..., Api], inline: int) -> None:
    service = start_service(inline_elements=inline)
    api = connect(service.url)
    api.create()
    # Of a lease that is known, a small body comes before its claim is looked at.
    lease = api.lease()
    assert api.push(lease, 0).status_code == 200
    token, before = Held.of(api, "push"), api.state(service)
    with begun(
        api.url, "POST", api.path("/gradients"), len(BODY), api.headers(lease, 1, "key") | token.headers
    ) as send:
        token.end()
        assert is_refused(send(BODY), "push")
    assert api.state(service) == before
    # The same push under a good token.
    assert api.push(lease, 1, "key").json()["step"] == 2


def test_a_state_in_the_place_of_a_runs(api: Api) -> None:
    api.create()
    train(api, 0, 2)
    state = export(api)
    train(api, 2, 3)
    token = Held.of(api, "admin")
    headers = {"Content-Type": MEDIA_TYPE, **token.headers}
    with begun(api.url, "PUT", api.path("/state?replace=true"), len(state), headers) as send:
        token.end()
        assert is_refused(send(state), "admin")
    assert (api.status()["step"], api.status()["epoch"]) == (3, 1)


def test_what_makes_tokens_is_made_by_none_that_has_ended(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service()
    api = connect(service.url)
    token, wish = Held.of(api, "admin"), b'{"name": "left behind", "scope": "admin"}'
    headers = {"Content-Type": "application/json", **token.headers}
    with begun(api.url, "POST", "/v1/tokens", len(wish), headers) as send:
        token.end()
        assert is_refused(send(wish), "admin")
    assert "left behind" not in api.http.get("/v1/tokens").text
    service.stop()
    noted = [json.loads(line) for line in (service.settings.data_dir / "audit.jsonl").read_text().splitlines()]
    assert [(each["who"].partition(" ")[0], each["result"]) for each in noted if each["what"] == "create_token"] == [
        ("admin-token", 201),
        ("test", "unauthenticated"),
    ]


def test_a_push_that_waits_for_its_update_is_sent_no_point(api: Api, service: ThreadService) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease, token = api.lease(), Held.of(api, "push")
    writer = service.registry.get(api.run).shard(0).core.writer
    more = {"Prefer": "wait=600, return=representation", **token.headers}
    waiting = under_way(lambda: api.push(lease, 0, "one", **more))
    wait_until(lambda: bool(writer._waiters))
    token.end()
    assert api.push(lease, 0, "two").json()["decision"] == "applied"
    assert slug(waiting.result(60)) == "unauthenticated"
    # It has counted.
    assert api.push(lease, 0, "one").json()["replayed"]


def test_a_body_for_another_process(shared_nodes: Callable[..., list[ThreadService]]) -> None:
    near, far = shared_nodes(2)
    api = ShardedApi(near.url)
    with closing(api.http):
        api.create(shards=2)
        lease, token = api.lease(), Held.of(api, "push")
        (shard,) = (number for number, each in enumerate(api.shards) if each["url"] == far.url)
        bodies = api.bodies(TENSORS)
        path = f"{api.path('/gradients')}?shard={shard}&of=2"
        headers = api.headers(lease, 0, "key") | token.headers
        with begun(near.url, "POST", path, len(bodies[shard]), headers) as send:
            assert httpx.get(f"{far.url}/v1/runs", headers=token.headers).status_code == 200
            token.end()
            # The message is on its way.
            wait_until(lambda: httpx.get(f"{far.url}/v1/runs", headers=token.headers).status_code == 401)
            assert is_refused(send(bodies[shard]), "push")
        assert [answer.json()["step"] for answer in api.push_parts(lease, 0, "key", bodies)] == [1, 1]
