"""The history of runs over HTTP, by the client and by the command."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

import pytest

import forked
from freestep import Client, MalformedRequest, RunNotFound
from freestep.api.history import CURVES, CurveName, History
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from plain_calls import Api, slug


def history(api: Api, *curves: CurveName | Literal["metrics", "milestones"], **how: Any) -> History:
    with Client(api.url, retry_for=60) as client:
        return client.run(api.run).history(curves or None, **how)


def pushes(api: Api, lease: dict[str, Any], first: int, count: int) -> None:
    """Pushes that are applied, each at the newest step, which is `first` before them; the loss is the step."""
    for step in range(first, first + count):
        answer = api.push(lease, step, Freestep_Loss=str(step), Freestep_Samples="4")
        assert answer.status_code == 200, answer.text


def report(api: Api, name: str, value: float, step: int) -> None:
    answer = api.http.post(api.path("/metrics"), json={"name": name, "value": value, "step": step})
    assert answer.status_code == 200, answer.text


def loss(found: History) -> list[tuple[int, float]]:
    return [(point.step, point.mean) for point in found.curves["loss"].points()]


def test_curves_have_what_has_happened(api: Api) -> None:
    began = time.time()
    api.create(aggregation={"policy": "async", "max_staleness": 0})
    lease = api.lease()
    pushes(api, lease, 0, 3)
    assert api.push(lease, 0).json()["decision"] == "dropped"
    report(api, "acc[/]", 0.5, 2)
    found = history(api)
    assert (found.run, found.epoch, found.step) == (api.run, 1, 3)
    assert set(found.curves) == set(CURVES)
    assert loss(found) == [(1, 0.0), (2, 1.0), (3, 2.0)]
    assert found.curves["samples"].mean == [4.0] * 3
    assert found.curves["dropped"].mean == [0.0, 0.0, 0.0, 1.0]
    assert [(each.step, each.mean) for each in found.metrics["acc[/]"].points()] == [(2, 0.5)]
    assert [(each.epoch, each.step) for each in found.epochs] == [(1, 0)]
    assert all(began - 1 <= at <= time.time() + 1 for at in found.curves["loss"].time)
    wait_until(lambda: history(api, "workers").curves["workers"].mean[-1:] == [1.0])


def test_some_curves_and_fewer_points(api: Api) -> None:
    api.create()
    pushes(api, api.lease(), 0, 5)
    report(api, "acc", 0.5, 2)
    found = history(api, "loss", points=3)
    assert (set(found.curves), found.metrics, found.milestones) == ({"loss"}, {}, [])
    assert found.curves["loss"].per_point == 2
    assert loss(found) == [(2, 0.5), (4, 2.5), (5, 4.0)]
    assert set(history(api, "metrics").metrics) == {"acc"}
    assert history(api, "metrics").curves == {}
    [joined] = [each for each in history(api, "milestones").milestones if each.event.kind == "lease"]
    assert (joined.event.model_dump()["change"], 0 <= time.time() - joined.time < 3600) == ("granted", True)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"curves": "luck"}, "curves"),
        ({"curves": "loss,"}, "curves"),
        ({"curves": ""}, "curves"),
        ({"points": "0"}, "points"),
        ({"points": "513"}, "points"),
        ({"points": "1_0"}, "points"),
        ({"points": ["5", "6"]}, "points"),
    ],
)
def test_what_there_is_not_is_refused(api: Api, query: dict[str, Any], field: str) -> None:
    api.create()
    answer = api.http.get(api.path("/history"), params=query)
    assert (answer.status_code, slug(answer), answer.json()["field"]) == (400, "malformed-request", field)
    with pytest.raises(MalformedRequest, match="loss, staleness"):
        history(api, cast(CurveName, "luck"))
    with pytest.raises(RunNotFound):
        history(Api(api.url, "nowhere"))


def test_a_run_that_goes_back_keeps_what_it_was(api: Api) -> None:
    api.create()
    lease = api.lease()
    pushes(api, lease, 0, 1)
    step = api.http.post(api.path("/checkpoints")).json()["step"]
    pushes(api, lease, 1, 2)
    assert api.http.post(api.path(f"/checkpoints/{step}/restore")).status_code == 200
    pushes(api, api.lease(), 1, 1)
    found = history(api)
    points = found.curves["loss"].points()
    assert [(each.epoch, each.step) for each in points] == [(1, 1), (1, 2), (1, 3), (2, 2)]
    assert [(each.epoch, each.step) for each in found.epochs] == [(1, 0), (2, 1)]


@pytest.mark.parametrize("place", ["a directory", "an object store"])
def test_it_is_there_after_a_restart_and_gone_with_the_run(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str, place: str
) -> None:
    where = {"checkpoint_url": f"memory://{uuid.uuid4().hex}"} if place == "an object store" else {}
    first = start_service(redis_url=redis_url, **where)
    api = connect(first.url)
    api.create()
    pushes(api, api.lease(), 0, 3)
    report(api, "acc", 0.5, 2)
    before = history(api)
    first.stop()
    again = connect(start_service(redis_url=redis_url, **where).url, api.run)
    assert loss(history(again)) == loss(before)
    assert history(again).metrics == before.metrics
    # Those of before, and of who owns the shards since.
    milestones = history(again, "milestones").milestones
    assert milestones[: len(before.milestones)] == before.milestones
    assert {"lease", "shards"} <= {each.event.kind for each in before.milestones}
    pushes(again, again.lease("another"), 3, 1)
    assert loss(history(again))[-1] == (4, 3.0)
    assert again.http.delete(again.path()).status_code == 204
    again.create()
    assert loss(history(again)) == []


def test_after_a_kill_a_journal_tells_of_the_rest(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    service = start_process()
    api = connect(service.url)
    api.create(durability="journal")
    pushes(api, api.lease(), 0, 4)
    service.kill()
    service.start()
    pushes(api, api.lease("another"), 4, 1)
    assert loss(history(api)) == [(step + 1, float(step)) for step in range(5)]


def test_a_damaged_history_keeps_no_run_closed(
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    redis_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    where = {"redis_url": redis_url, "checkpoint_url": str(tmp_path / "kept")}
    first = start_service(**where)
    api = connect(first.url)
    api.create()
    pushes(api, api.lease(), 0, 2)
    first.stop()
    (tmp_path / f"kept/histories/{api.run}.json").write_text("{")
    for step in (2, 3):
        service = start_service(**where)
        again = connect(service.url, api.run)
        pushes(again, again.lease(f"worker-{step}"), step, 1)
        assert loss(history(again))[0] == (3, 2.0)
        service.stop()
    assert caplog.text.count(f"run {api.run}: its history is damaged, and begins anew") == 1


def test_any_process_tells_of_a_run_that_others_own(
    shared_nodes: Callable[..., list[ThreadService]], connect: Callable[..., Api]
) -> None:
    nodes = shared_nodes(2)
    api = connect(nodes[0].url)
    api.create()
    pushes(api, api.lease(), 0, 3)
    curves = [loss(history(connect(node.url, api.run))) for node in nodes]
    assert curves == [[(1, 0.0), (2, 1.0), (3, 2.0)]] * 2


def test_the_command_shows_it(api: Api) -> None:
    api.create()
    pushes(api, api.lease(), 0, 3)
    report(api, "acc[/]", 0.5, 2)
    shown = forked.freestep("history", api.run, FREESTEP_URL=api.url, COLUMNS="120")
    assert shown.returncode == 0, shown.stderr
    lines = {line[: line.index("  ")].strip(): line.split()[-8:] for line in shown.stdout.splitlines()}
    assert lines["loss"] == ["3", "1", "1", "3", "0", "0", "2", "2"]
    assert lines["metric acc[/]"] == ["1", "1", "2", "2", "0.5", "0.5", "0.5", "0.5"]
    assert lines["accumulated"][:2] == ["3", "1"]
    shown = forked.freestep(
        *("history", api.run, "--curve", "loss", "--curve", "metrics", "--points", "2", "--json"), FREESTEP_URL=api.url
    )
    document = json.loads(shown.stdout)
    assert list(document["curves"]) == ["loss"] and list(document["metrics"]) == ["acc[/]"]
    assert document["curves"]["loss"]["count"] == [2, 1]
    shown = forked.freestep("history", api.run, "--curve", "luck", FREESTEP_URL=api.url)
    assert (shown.returncode, "there is no luck" in shown.stderr) == (2, True)
    shown = forked.freestep("history", api.run, "--milestones", FREESTEP_URL=api.url, COLUMNS="120")
    [granted] = [line for line in shown.stdout.splitlines() if " lease " in line]
    date, clock, *rest = granted.split()
    assert datetime.now() - datetime.fromisoformat(f"{date} {clock}") < timedelta(hours=1)
    assert rest == ["1", "0", "lease", "granted", "to", "worker"]
    shown = forked.freestep("history", api.run, "--milestones", "--json", FREESTEP_URL=api.url)
    assert "lease" in {each["event"]["kind"] for each in json.loads(shown.stdout)["milestones"]}
    shown = forked.freestep("history", api.run, "--milestones", "--points", "5", FREESTEP_URL=api.url)
    assert (shown.returncode, "goes without" in shown.stderr) == (2, True)
