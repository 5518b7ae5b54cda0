"""What a large JSON document costs: faults, counts and turns have bounds, and the service answers others meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

import freestep_service.web.limits
import freestep_service.web.routes.runs
from freestep.api.models import RunSpec, RunStatus, Topology
from freestep.api.spec import MOST_GROUPS, MOST_PARAMETERS
from freestep.client import Client
from freestep.errors import Overloaded
from freestep_service.runs.telemetry import Metrics
from freestep_service.web.json_bodies import SMALL, JsonBodies, validated
from harness import AUTHORIZED, ThreadService
from meanwhile import DEADLINE_S, under_way
from plain_calls import Api, slug


def put(api: Api, content: bytes) -> httpx.Response:
    return api.http.put(api.path(), content=content, headers={"Content-Type": "application/json"})


def spec(**members: bytes) -> bytes:
    given = {"optimizer": b'{"algorithm": "sgd"}', "parameters": b'[{"name": "w", "shape": []}]', **members}
    return b"{" + b",".join(json.dumps(name).encode() + b":" + value for name, value in given.items()) + b"}"


MANY = 200_000


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (spec(parameters=b"[" + b",".join([b'{"name":0}'] * MANY) + b"]"), 422, "parameters.0.name"),
        (spec(parameters=b"[" + b",".join([b"0"] * MANY) + b"]"), 422, "parameters.0"),
        (spec(**{f"member-{number}": b"0" for number in range(MANY)}), 400, "1024 members"),
        (spec(optimizer=b"{" + b",".join(b'"%d":0' % each for each in range(MANY)) + b"}"), 400, "1024 members"),
        (spec(parameters=b"[" + b",".join([b"[]"] * 2_000_000) + b"]"), 400, "values"),
        (spec(**{"x" * 100_000: b"0"}), 422, "xxx"),
        (spec(optimizer=b'{"algorithm": "sgd", "' + b"y" * 100_000 + b'": 0}'), 422, "optimizer.y"),
    ],
    ids=["faulty", "numbers", "members", "hyperparameters", "values", "long name", "long hyperparameter"],
)
def test_of_many_faults_few_are_named(api: Api, content: bytes, status: int, said: str) -> None:
    answer = put(api, content)
    assert (answer.status_code, said in answer.text) == (status, True)
    assert len(answer.content) < 8000
    assert slug(api.http.get(api.path())) == "run-not-found"


def test_a_model_may_have_many_tensors_and_groups() -> None:
    tensors = [{"name": str(number), "shape": [1]} for number in range(MOST_PARAMETERS)]
    groups: dict[str, Any] = {str(number): {"lr": 0.1} for number in range(MOST_GROUPS)}
    document = {"optimizer": {"algorithm": "sgd"}, "parameters": tensors, "groups": groups}
    assert len(RunSpec.model_validate(document).parameters) == MOST_PARAMETERS
    with pytest.raises(ValidationError, match="at most 131072 items"):
        RunSpec.model_validate({**document, "parameters": [*tensors, {"name": "w", "shape": [1]}]})
    with pytest.raises(ValidationError, match="at most 1024 items"):
        RunSpec.model_validate({**document, "groups": {**groups, "g": {}}})


def test_others_are_answered_while_a_spec_is_validated(
    service: ThreadService, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, answered = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Any:
        begun.set()
        assert answered.wait(DEADLINE_S), "nothing was answered while a spec was validated"
        return validated(*arguments)

    monkeypatch.setattr(freestep_service.web.limits, "validated", slowly)
    creation = under_way(lambda: put(api, spec(groups=b'{"g": {}' + b" " * SMALL + b"}")))
    assert begun.wait(DEADLINE_S)
    assert httpx.get(f"{service.url}/healthz").status_code == 200
    # What is small is validated at once, and waits for nothing.
    assert httpx.get(f"{service.url}/v1/runs", headers=AUTHORIZED).status_code == 200
    answered.set()
    assert creation.result().status_code == 201


def test_large_bodies_take_turns_by_token() -> None:
    async def scenario() -> None:
        bodies, entered, end = JsonBodies(0.05), asyncio.Semaphore(0), asyncio.Event()

        async def send(token: str) -> None:
            async with bodies.large(token):
                entered.release()
                await end.wait()

        senders = [asyncio.create_task(send(token)) for token in "aabb"]
        for _ in senders:
            await entered.acquire()
        for token in "ac":
            with pytest.raises(Overloaded):
                await send(token)
        end.set()
        await asyncio.gather(*senders)
        await send("a")
        bodies.close()

    asyncio.run(scenario())


def test_a_status_is_what_the_model_says(api: Api) -> None:
    made = api.create(groups={"g": {"lr": 0.5}}).json()
    assert RunStatus.model_validate(made).spec == RunSpec.model_validate(api.spec(groups={"g": {"lr": 0.5}}))
    assert made.keys() == RunStatus.model_validate(made).model_dump().keys()


def test_a_topology_is_what_the_model_says(service: ThreadService, api: Api) -> None:
    api.create(shards=2)
    document = api.http.get(api.path("/topology")).json()
    assert Topology.model_validate(document).model_dump(mode="json") == document
    run = service.registry.get(api.run)
    layout = run._layout
    assert api.http.get(api.path("/topology")).json()["shards"] == document["shards"]
    assert run._layout is layout
    assert api.http.post(api.path("/reshard"), json={"shards": 3}).status_code == 200
    slices = [part for shard in api.http.get(api.path("/topology")).json()["shards"] for part in shard["slices"]]
    assert sum(part["end"] - part["begin"] for part in slices) == 7


@pytest.fixture
def listed(start_service: Callable[..., ThreadService]) -> tuple[ThreadService, list[str]]:
    """A service with five runs, and their names."""
    made, names = start_service(), ["a", "a-1", "b", "c", "d"]
    for name in names:
        api = Api(made.url, name)
        assert api.http.put(api.path(), json=api.spec()).status_code == 201
        api.http.close()
    return made, names


def test_runs_are_listed_in_pages(listed: tuple[ThreadService, list[str]]) -> None:
    service, names = listed
    with httpx.Client(base_url=service.url, headers=AUTHORIZED) as http:

        def page(**query: Any) -> tuple[list[str], str | None]:
            answer = http.get("/v1/runs", params=query)
            document = answer.json()
            assert ("next" in answer.links) == (document["next"] is not None)
            return [status["run"] for status in document["runs"]], document["next"]

        assert page() == (names, None)
        assert page(limit=5) == (names, None)
        assert page(limit=2) == (["a", "a-1"], "a-1")
        following = http.get("/v1/runs", params={"limit": 2}).links["next"]["url"]
        # The place is a name: it stays, whatever is deleted.
        assert http.delete("/v1/runs/a-1").status_code == 204
        assert [status["run"] for status in http.get(following).json()["runs"]] == ["b", "c"]
        assert page(limit=2, after="c") == (["d"], None)
        assert page(after="zzz") == ([], None)
        for wrong in ("limit=0", "limit=1001", "limit=1_0", "limit=x", "after=.."):
            answer = http.get(f"/v1/runs?{wrong}")
            assert (answer.status_code, slug(answer)) == (400, "malformed-request")


def test_a_page_is_no_larger_than_a_spec_may_be(
    listed: tuple[ThreadService, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, names = listed
    monkeypatch.setattr(freestep_service.web.routes.runs, "LONGEST_SPEC", 1)
    first = httpx.get(f"{service.url}/v1/runs", headers=AUTHORIZED).json()
    assert (len(first["runs"]), first["next"]) == (1, "a")
    with Client(service.url) as client:
        assert [status.run for status in client.runs()] == names


def test_who_asks_for_metrics_at_once_shares_them() -> None:
    async def scenario() -> None:
        metrics = Metrics()
        first, second = await asyncio.gather(metrics.expose(), metrics.expose())
        assert first is second
        metrics.problems.labels("overloaded").inc()
        assert b'slug="overloaded"' in await metrics.expose()

    asyncio.run(scenario())
