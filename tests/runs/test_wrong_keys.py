"""Keys that another program wrote: what is wrong with them is said once in the log and by /readyz, with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from freestep_service.coordination.condition import SHARED_KEYS
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import Api, persistently, slug

KEYS = ("run", "shards", "receipts", "leases", "log", "queue", "metrics", "out")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadService]:
    running = ThreadService(tmp_path_factory.mktemp("data"))
    yield running
    running.stop()


@pytest.fixture
def trained(own: ThreadService, connect: Callable[..., Api]) -> Api:
    """A run with a push and a metric."""
    api = connect(own.url)
    api.create()
    assert api.push(api.lease(), 0, "one").json()["step"] == 1
    assert api.http.post(api.path("/metrics"), json={"name": "loss", "value": 0.5, "step": 1}).status_code == 200
    return api


@pytest.mark.parametrize("name", KEYS)
def test_a_key_of_a_run(own: ThreadService, trained: Api, caplog: pytest.LogCaptureFixture, name: str) -> None:
    key = trained.redis_key(name)

    def problem() -> str:
        answer = trained.http.get("/readyz")
        assert answer.status_code == 200
        found: dict[str, str] = answer.json()["problems"]
        return found.get(trained.run, "")

    with own.redis() as client:
        with client.pipeline(transaction=True) as stroke:
            stroke.delete(key)
            stroke.set(key, "text")
            stroke.execute()
        wait_until(lambda: f"WRONGTYPE {key} is a string and not a " in problem())
        said = caplog.text.count(f"WRONGTYPE {key} is a string")
        assert ", DEL it, and the run is opened again from its shards" in problem()
        beats = client.hget(trained.redis_key("shards"), "0:ends") if name not in ("run", "shards") else None
        if beats is not None:
            wait_until(lambda: client.hget(trained.redis_key("shards"), "0:ends") not in (None, beats))
        assert caplog.text.count(f"WRONGTYPE {key} is a string") == said == 1
        client.delete(key)
    wait_until(lambda: problem() == "")
    lease = persistently(lambda: trained.http.post(trained.path("/leases"), json={"worker": "worker"})).json()
    assert persistently(lambda: trained.push(lease, 1, "two")).json()["step"] == 2
    status = trained.status()
    assert (status["epoch"], status["metrics"]) == (1, {"loss": {"value": 0.5, "step": 1}})


@pytest.mark.parametrize("key", SHARED_KEYS)
def test_a_key_of_all_services(own: ThreadService, trained: Api, caplog: pytest.LogCaptureFixture, key: str) -> None:
    wrong = "list" if SHARED_KEYS[key] == "string" else "string"

    def readiness() -> Any:
        return trained.http.get("/readyz")

    with own.redis() as client:
        with client.pipeline(transaction=True) as stroke:
            stroke.delete(key)
            stroke.rpush(key, "text") if wrong == "list" else stroke.set(key, "text")
            stroke.execute()
        wait_until(lambda: readiness().status_code == 503)
        assert slug(readiness()) == "coordinator-unavailable"
        expected = f"WRONGTYPE {key} is a {wrong} and not a {SHARED_KEYS[key]}: another program wrote it, DEL it"
        assert expected in readiness().json()["detail"]
        assert caplog.text.count(expected) == 1
        client.delete(key)
        wait_until(lambda: readiness().status_code == 200)
    assert trained.http.put("/v1/runs/another", json=trained.spec()).status_code == 201
    assert trained.http.delete("/v1/runs/another").status_code == 204


def test_the_list_of_runs_is_written_again(own: ThreadService, trained: Api) -> None:
    with own.redis() as client:
        client.delete("freestep:runs")
        wait_until(lambda: client.smembers("freestep:runs") >= {trained.run})
