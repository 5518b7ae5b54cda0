"""Runs, leases, checkpoints and the rest of the control plane, over plain HTTP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import torch

from harness import ThreadService
from meanwhile import at_once
from plain_calls import TENSORS, Api, slug


def test_a_run_is_created_once(api: Api) -> None:
    first = api.http.put(api.path(), json=api.spec())
    assert first.status_code == 201
    document = first.json()
    assert (document["run"], document["epoch"], document["step"]) == (api.run, 1, 0)
    assert document["initialized"] is False
    assert document["spec"]["optimizer"]["momentum"] == 0.9
    assert document["parameter_count"] == 7
    assert api.http.put(api.path(), json=api.spec()).status_code == 200
    other = api.http.put(api.path(), json=api.spec(optimizer={"algorithm": "sgd"}))
    assert (other.status_code, slug(other)) == (409, "run-exists")
    assert other.json()["differences"] == [
        {"field": "optimizer.algorithm", "wanted": "sgd", "existing": "sgd_schedule_free"}
    ]
    assert "optimizer.algorithm is sgd_schedule_free, and sgd is wanted" in other.json()["detail"]
    assert api.status()["spec"]["optimizer"]["algorithm"] == "sgd_schedule_free"


def test_defaults_of_a_spec(api: Api) -> None:
    spec = api.spec()
    del spec["aggregation"]
    made = api.http.put(api.path(), json=spec).json()["spec"]
    assert made["aggregation"]["policy"] == "ringmaster"
    assert made["durability"] == "checkpoint"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("optimizer.lrr", {"optimizer": {"algorithm": "sgd", "lrr": 1}}),
        ("optimizer.lr", {"optimizer": {"algorithm": "sgd", "lr": -1}}),
        ("optimizer.betas.0", {"optimizer": {"algorithm": "adamw_schedule_free", "betas": [1.0, 0.9]}}),
        ("optimizer.algorithm", {"optimizer": {"algorithm": "adagrad"}}),
        ("optimizer.algorithm", {"optimizer": {}}),
        ("optimizer", {"optimizer": "sgd"}),
        ("aggregation.batch", {"aggregation": {"policy": "rennala"}}),
        ("aggregation.policy", {"aggregation": {"policy": "bsp"}}),
        ("parameters", {"parameters": []}),
        ("parameters.0.shape.0", {"parameters": [{"name": "w", "shape": [-1]}]}),
        ("parameters.0.group", {"parameters": [{"name": "w", "shape": [1], "group": "none"}]}),
        ("parameters", {"parameters": [{"name": "w", "shape": [2**40, 2**40]}]}),
        ("groups.slow.lr", {"groups": {"slow": {"lr": "fast"}}}),
        ("groups.slow.algorithm", {"groups": {"slow": {"algorithm": "sgd"}}}),
        ("groups.slow.lrr", {"groups": {"slow": {"lrr": 1}}}),
        ("optimizer.lr", {"optimizer": {"algorithm": "sgd", "lr": "0.1"}}),
        ("optimizer.nesterov", {"optimizer": {"algorithm": "sgd", "nesterov": True}}),
        ("optimizer.momentum", {"optimizer": {"algorithm": "sgd_schedule_free", "momentum": 0}}),
        ("optimizer.max_grad_norm", {"optimizer": {"algorithm": "sgd", "max_grad_norm": 0}}),
        ("optimizer.warmup_steps", {"optimizer": {"algorithm": "sgd_schedule_free", "warmup_steps": 1.5}}),
        ("optimizer.base", {"optimizer": {"algorithm": "schedule_free_wrapper"}}),
        ("optimizer.base.algorithm", {"optimizer": {"algorithm": "schedule_free_wrapper", "base": {}}}),
        (
            "optimizer.base.betas.0",
            {"optimizer": {"algorithm": "schedule_free_wrapper", "base": {"algorithm": "adam", "betas": [1, 0.9]}}},
        ),
        ("optimizer.schedule.total_steps", {"optimizer": {"algorithm": "sgd", "schedule": {"name": "cosine"}}}),
        ("optimizer.averaging.name", {"optimizer": {"algorithm": "sgd", "averaging": {"name": "swa"}}}),
        (
            "groups.slow.averaging",
            {"optimizer": {"algorithm": "sgd"}, "groups": {"slow": {"averaging": {"name": "polyak"}}}},
        ),
        ("optimizer.mu_x", {"optimizer": {"algorithm": "gpa_adamw", "mu_x": 1}}),
        ("optimizer.averaging_constant", {"optimizer": {"algorithm": "sgd_schedule_free", "averaging_constant": 0}}),
        ("aggregation.batch", {"aggregation": {"policy": "quorum", "batch": 0}}),
        ("aggregation.max_staleness", {"aggregation": {"policy": "async", "max_staleness": -1}}),
        ("aggregation.staleness_damping", {"aggregation": {"policy": "async", "staleness_damping": "some"}}),
        ("parameters.1.name", {"parameters": [{"name": "w", "shape": [1]}, {"name": "w", "shape": [2]}]}),
        ("parameters.0.name", {"parameters": [{"name": "__metadata__", "shape": [1]}]}),
        ("lease_ttl_ms", {"lease_ttl_ms": 1}),
        ("shards", {"shards": 257}),
        ("durability", {"durability": "disk"}),
        ("colour", {"colour": "blue"}),
    ],
)
def test_an_invalid_spec_names_its_field(api: Api, field: str, changes: dict[str, Any]) -> None:
    answer = api.http.put(api.path(), json=api.spec(**changes))
    assert (answer.status_code, slug(answer)) == (422, "invalid-spec")
    assert answer.json()["field"] == field
    assert slug(api.http.get(api.path())) == "run-not-found"


NOT_JSON = [b"{", b"nonsense", b"\xff\xfe", b'{"a": "\xff"}', b"[" * 60_000, b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_not_json_is_refused(api: Api, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    for answer in (
        api.http.put(api.path(), content=content, headers=headers),
        api.create() and api.http.post(api.path("/leases"), content=content, headers=headers),
    ):
        assert (answer.status_code, slug(answer)) == (400, "malformed-request")


@pytest.mark.parametrize("content", [b"", b"[]", b'"spec"', b'{"colour\\ud800": 1}'])
def test_what_is_not_a_spec_is_refused(api: Api, content: bytes) -> None:
    answer = api.http.put(api.path(), content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, slug(answer)) == (422, "invalid-spec")


def test_a_spec_is_the_same_in_another_order(api: Api) -> None:
    groups = {"slow": {"lr": 1, "r": 0.0}, "fast": {"lr": 10.0}}
    assert api.http.put(api.path(), json=api.spec(groups=groups)).status_code == 201
    again = {"fast": {"lr": 10}, "slow": {"r": 0, "lr": 1.0}}
    spec = dict(reversed(api.spec(groups=again, durability="checkpoint").items()))
    assert api.http.put(api.path(), json=spec).status_code == 200
    again["fast"]["lr"] = 11
    assert slug(api.http.put(api.path(), json=api.spec(groups=again))) == "run-exists"


def test_a_spec_over_the_limit_is_refused(api: Api) -> None:
    content = b'{"optimizer": "' + bytes(17 * 1024**2) + b'"}'
    answer = api.http.put(api.path(), content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, slug(answer)) == (413, "body-too-large")


@pytest.mark.parametrize("name", ["-dash", "sp ace", "x" * 129, "a{b}", ".hidden"])
def test_a_run_has_a_plain_name(api: Api, name: str) -> None:
    answer = api.http.put(f"/v1/runs/{name}", json=api.spec())
    assert (answer.status_code, slug(answer)) == (400, "malformed-request")


def test_runs_are_listed_and_deleted(api: Api) -> None:
    api.create()
    assert api.run in [run["run"] for run in api.http.get("/v1/runs").json()["runs"]]
    assert api.http.delete(api.path()).status_code == 204
    assert api.run not in [run["run"] for run in api.http.get("/v1/runs").json()["runs"]]
    for answer in (api.http.get(api.path()), api.http.delete(api.path()), api.http.get(api.path("/parameters"))):
        assert (answer.status_code, slug(answer)) == (404, "run-not-found")
    assert slug(api.http.post(api.path("/leases"), json={"worker": "w"})) == "run-not-found"
    assert api.create().json()["step"] == 0


def test_a_run_of_another_id_is_not_deleted(api: Api) -> None:
    run_id = api.create().json()["id"]
    answer = api.http.delete(api.path(), params={"id": "another"})
    assert (answer.status_code, slug(answer)) == (404, "run-not-found")
    assert api.http.get(api.path()).json()["id"] == run_id
    assert api.http.delete(api.path(), params={"id": run_id}).status_code == 204


def test_of_many_who_delete_a_run_at_once_one_does(
    api: Api, service: ThreadService, connect: Callable[..., Api]
) -> None:
    api.create()
    answers = at_once(*(partial(connect(service.url).http.delete, api.path()) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [204, 404, 404, 404]


def test_a_deleted_run_leaves_its_last_epoch_alone(api: Api, service: ThreadService) -> None:
    api.create()
    api.lease()
    assert api.push(api.lease(), 0).status_code == 200
    prefix = api.redis_key()
    assert service.redis_dump(prefix)
    api.http.delete(api.path())
    assert service.redis_dump(prefix) == {api.redis_key("deleted"): "1"}
    assert not (service.settings.data_dir / "runs" / api.run).exists()
    assert f'"{api.run}"' not in api.http.get("/metrics").text


def test_many_runs_do_not_touch_each_other(service: ThreadService, connect: Callable[..., Api]) -> None:
    apis = [connect(service.url) for _ in range(5)]
    for api in apis:
        api.create()
    for steps, api in enumerate(apis):
        lease = api.lease()
        for step in range(steps):
            assert api.push(lease, step).json()["step"] == step + 1
    assert [api.status()["step"] for api in apis] == [0, 1, 2, 3, 4]
    for api in apis:
        assert api.http.delete(api.path()).status_code == 204


def test_redis_can_be_read_by_a_person(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease("reader")
    api.push(lease, 0, "a-key")
    prefix = api.redis_key()
    dump = service.redis_dump(prefix)
    assert {key: dump[f"{prefix}run"][key] for key in ("epoch", "step", "seq", "initialized", "applied")} == {
        "epoch": "1",
        "step": "1",
        "seq": "1",
        "initialized": "1",
        "applied": "1",
    }
    assert dump[f"{prefix}leases"] == ["reader"]
    assert dump[f"{prefix}workers"] == {"reader": lease["lease"]}
    assert dump[f"{prefix}lease:{lease['lease']}"]["pushes"] == "1"
    assert list(dump[f"{prefix}receipts"]) == ["", "a-key"]
    assert dump[f"{prefix}log"][0][0] == "1-0"


def test_checkpoints_are_written_listed_and_gone_back_to(api: Api) -> None:
    api.create()
    lease = api.lease()
    api.push(lease, 0, "before")
    written = api.http.post(api.path("/checkpoints"))
    assert written.status_code == 201
    assert (written.json()["step"], written.json()["epoch"]) == (1, 1)
    kept, _ = api.pull("x")
    api.push(lease, 1, "after")
    steps = [each["step"] for each in api.http.get(api.path("/checkpoints")).json()["checkpoints"]]
    assert steps == [0, 1]
    restored = api.http.post(api.path("/checkpoints/1/restore"))
    assert restored.status_code == 200
    assert (restored.json()["step"], restored.json()["epoch"]) == (1, 2)
    x, step = api.pull("x")
    assert step == 1
    assert all(torch.equal(x[name], kept[name]) for name in TENSORS)


def test_after_a_restore_old_leases_no_longer_push(api: Api, service: ThreadService) -> None:
    api.create()
    lease = api.lease()
    api.push(lease, 0, "before")
    api.http.post(api.path("/checkpoints"))
    api.push(lease, 1, "after")
    api.http.post(api.path("/checkpoints/1/restore"))
    before = api.state(service)
    for answer in (api.push(lease, 1), api.http.put(api.path(f"/leases/{lease['lease']}"))):
        assert (answer.status_code, slug(answer)) == (409, "epoch-changed")
        assert answer.json()["epoch"] == 2
    assert slug(api.push(lease, 1, "after")) == "epoch-changed"
    assert api.push(lease, 0, "before").json() == {"decision": "applied", "step": 1, "staleness": 0, "replayed": True}
    assert api.state(service) == before
    assert api.push(api.lease(), 1).json()["step"] == 2


def test_checkpoints_that_are_not_there(api: Api) -> None:
    api.http.put(api.path(), json=api.spec())
    assert slug(api.http.post(api.path("/checkpoints"))) == "run-not-initialized"
    missing = api.http.post(api.path("/checkpoints/7/restore"))
    assert (missing.status_code, slug(missing)) == (404, "checkpoint-not-found")
    assert slug(api.http.post(api.path("/checkpoints/-1/restore"))) == "malformed-request"
    assert slug(api.http.post(api.path("/checkpoints/x/restore"))) == "malformed-request"
    problem = api.http.post(api.path("/checkpoints/1_0/restore")).json()
    assert problem["detail"] == f"step: must be an integer from 0 to {10**18 - 1}"
    assert problem["field"] == "step"


def test_an_answer_without_a_body_has_no_media_type(api: Api) -> None:
    api.http.put(api.path(), json=api.spec())
    answer = api.http.delete(api.path())
    assert (answer.status_code, answer.content) == (204, b"")
    assert "Content-Type" not in answer.headers


def test_health_and_documents(api: Api) -> None:
    assert api.http.get("/healthz").json() == {"status": "ok", "version": version("freestep")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ready = api.http.get("/readyz").json()
    assert (ready["status"], ready["device"]) == ("ready", device)
    assert api.http.get("/docs").status_code == 200
    paths = api.http.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/tokens",
        "/v1/tokens/{id}",
        "/v1/runs",
        "/v1/runs/{run}",
        "/v1/runs/{run}/topology",
        "/v1/runs/{run}/data",
        "/v1/runs/{run}/data/{name}",
        "/v1/runs/{run}/data/{name}/units",
        "/v1/runs/{run}/reshard",
        "/v1/runs/{run}/state",
        "/v1/runs/{run}/events",
        "/v1/runs/{run}/history",
        "/v1/runs/{run}/workers/{worker}",
        "/v1/runs/{run}/metrics",
        "/v1/runs/{run}/parameters",
        "/v1/runs/{run}/leases",
        "/v1/runs/{run}/leases/{lease}",
        "/v1/runs/{run}/leases/{lease}/memory",
        "/v1/runs/{run}/gradients",
        "/v1/runs/{run}/checkpoints",
        "/v1/runs/{run}/checkpoints/{step}/restore",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    headers = [each["name"] for each in paths["/v1/runs/{run}/gradients"]["post"]["parameters"]]
    assert {"Freestep-Lease", "Freestep-Token", "Freestep-Step", "Idempotency-Key", "Prefer"} <= set(headers)


def test_an_unknown_path_is_a_problem_too(api: Api) -> None:
    for answer, status in ((api.http.get("/v2"), 404), (api.http.post(api.path()), 405)):
        assert answer.status_code == status
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["type"] == "about:blank"


def test_metrics_follow_a_run(api: Api) -> None:
    def value(name: str) -> float:
        lines = api.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and f'"{api.run}"' in line)

    api.create()
    lease = api.lease()
    api.push(lease, 0, "once", Freestep_Loss="2.5")
    api.push(lease, 0, "once")
    api.pull("x")
    assert value("freestep_pushes_total") == 1
    assert value("freestep_replays_total") == 1
    assert value("freestep_step{") == 1
    assert value("freestep_loss") == 2.5
    assert value("freestep_received_bytes_total") > 0
    assert value("freestep_sent_bytes_total") > 0
    assert api.status()["loss"] == 2.5


def test_while_redis_is_away(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], redis_url: str
) -> None:
    service = start_service(redis_url=redis_url, commit_seconds=0.5)
    api = connect(service.url)
    api.create()
    lease = api.lease()
    with service.redis() as client:
        client.shutdown(nosave=True)
    answers = [
        api.push(lease, 0),
        api.http.get("/readyz"),
        api.http.get(api.path()),
        api.http.post(api.path("/leases"), json={"worker": "w"}),
    ]
    for answer in answers:
        assert (answer.status_code, slug(answer)) == (503, "coordinator-unavailable")
        assert int(answer.headers["Retry-After"]) > 0
    assert api.http.get("/healthz").status_code == 200
    x, step = api.pull("x")
    assert step == 0
    assert torch.equal(x["w"], TENSORS["w"])
