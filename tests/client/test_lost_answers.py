"""Calls that are repeated, since the answer to an attempt which did what was asked was lost."""

from __future__ import annotations

import httpx
import pytest
import torch

from freestep import AlreadyInitialized, Client, Run, RunNotFound
from freestep.errors import CoordinatorUnavailable, Overloaded
from harness import ThreadService
from lost_answers import LosingClient
from region_sides import NUMEL, OF_REGION


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"count": torch.full((NUMEL,), value)}


def test_a_run_is_deleted(service: ThreadService, run: Run) -> None:
    with LosingClient(service.url) as client:
        run.create(OF_REGION)
        client.loses.append(("DELETE", run.name))
        client.run(run.name).delete()
        assert not client.loses
        with pytest.raises(RunNotFound):
            client.run(run.name).delete()


def test_a_run_that_was_made_anew_meanwhile_is_not_deleted(service: ThreadService, run: Run) -> None:
    old = run.create(OF_REGION)
    with LosingClient(service.url, lost=lambda: run.create(OF_REGION)) as client:
        client.loses.append(("DELETE", run.name))
        client.run(run.name).delete()
        assert not client.loses
    assert run.status().id != old.id


def test_a_run_gets_its_first_weights(service: ThreadService, run: Run) -> None:
    run.create(OF_REGION)
    with LosingClient(service.url) as client:
        client.loses.append(("PUT", "/parameters"))
        losing = client.run(run.name)
        losing.initialize(weights(1.0))
        assert not client.loses
        assert losing.pull("y")[0]["count"][0] == 1.0
        with pytest.raises(AlreadyInitialized):
            losing.initialize(weights(1.0))


def test_units_are_given_back(service: ThreadService, run: Run) -> None:
    run.create(OF_REGION)
    run.initialize(weights(1.0))
    run.data().create({"length": 10, "unit": 2})
    with LosingClient(service.url) as client, run.lease("worker") as held:
        data = client.run(run.name).data()
        assert [unit.unit for unit in data.claim(held.granted, 3).units] == [0, 1, 2]
        for units, given in (([1], [1]), (None, [0, 2])):
            client.loses.append(("DELETE", "/units"))
            assert data.give_back(held.granted, units) == given
            assert not client.loses
        assert data.give_back(held.granted) == []
        assert data.status().open == 5


def test_a_worker_is_ended(service: ThreadService, run: Run) -> None:
    run.create(OF_REGION)
    run.initialize(weights(1.0))
    with LosingClient(service.url) as client, run.lease("worker"):
        losing = client.run(run.name)
        for ban, had_lease in ((None, True), (3600, False)):
            client.loses.append(("DELETE", "/worker"))
            ended = losing.end_worker("worker", ban=ban)
            assert not client.loses
            assert (ended.ended, ended.suspended_ms) == (had_lease, ban and 1000 * ban)
        assert [event.kind for event in run.events(follow=False)].count("control") == 1
        # Later requests are others.
        assert losing.end_worker("worker", ban=0).suspended_ms == 0
        run.lease("worker").release()


def test_a_token_is_revoked(service: ThreadService) -> None:
    with LosingClient(service.url) as client:
        made = client.create_token("somebody", "read")
        client.loses.append(("DELETE", made.id))
        client.revoke_token(made.id)
        assert not client.loses
        assert made.id not in [each.id for each in client.tokens()]


@pytest.mark.parametrize(
    ("failure", "is_done"),
    [
        (httpx.ConnectError("refused"), False),
        (httpx.ConnectTimeout("no connection"), False),
        (httpx.ReadTimeout("no answer"), True),
        (httpx.Response(429, json=Overloaded().to_document(429)), False),
        (httpx.Response(502, json={}), True),
        (httpx.Response(503, json=CoordinatorUnavailable().to_document(503)), True),
    ],
)
def test_what_was_never_there_is_not_found_after_a_failure_that_did_nothing(
    failure: Exception | httpx.Response, is_done: bool
) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if asked.count("DELETE") == 1 and isinstance(failure, Exception):
            raise failure
        if asked.count("DELETE") == 1 and isinstance(failure, httpx.Response):
            return failure
        return httpx.Response(404, json=RunNotFound().to_document(404))

    http = httpx.Client(base_url="http://service", transport=httpx.MockTransport(answer))
    with Client(http=http, retry_for=10.0) as client:
        if is_done:
            client.run("run").delete()
        else:
            with pytest.raises(RunNotFound):
                client.run("run").delete()
    assert asked == ["GET", "DELETE", "DELETE"]
