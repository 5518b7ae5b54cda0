"""`freestep set`, `pause`, `resume` and `end-worker`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from subprocess import CompletedProcess

import pytest

import forked
from freestep import Client, Run
from harness import ThreadService
from plain_calls import TENSORS

pytestmark = pytest.mark.slow


@pytest.fixture
def run(service: ThreadService) -> Iterator[Run]:
    spec = {
        "optimizer": {"algorithm": "adamw_schedule_free", "lr": 0.5},
        "parameters": [{"name": name, "shape": list(tensor.shape), "group": "all"} for name, tensor in TENSORS.items()],
        "groups": {"all": {}},
    }
    with Client(service.url) as client:
        made = client.run(f"cli-{uuid.uuid4().hex[:8]}")
        made.create(spec)
        made.initialize(TENSORS)
        yield made


def freestep(service: ThreadService, *arguments: str) -> CompletedProcess[str]:
    return forked.freestep(*arguments, FREESTEP_URL=service.url, COLUMNS="120")


def test_a_run_is_changed_and_shown(service: ThreadService, run: Run) -> None:
    done = freestep(
        service, "set", run.name, "lr=0.001", "betas=[0.8,0.9]", "groups.all.weight_decay=0.1",
        "aggregation.policy=buffered", "aggregation.batch=4", "delay_correction.name=none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for fact in ("lr=0.001", "buffered", "groups.all.weight_decay=0.1", "aggregation.batch=4"):
        assert fact in done.stdout
    status = run.status()
    assert status.control.aggregation == {"policy": "buffered", "batch": 4}
    assert status.control.groups == {"all": {"weight_decay": 0.1}}
    assert freestep(service, "pause", run.name).returncode == 0
    assert "buffered (paused)" in freestep(service, "runs", "list").stdout
    resumed = freestep(service, "resume", run.name, "--json")
    assert json.loads(resumed.stdout)["control"]["paused"] is False
    changes = [event.changes for event in run.events(follow=False) if event.kind == "control"]  # type: ignore[union-attr]
    assert changes[1:] == [{"paused": True}, {"paused": False}]
    shown = freestep(service, "events", run.name).stdout
    assert 'control    {"paused": true} by admin-token' in shown


def test_a_value_that_is_too_deep_for_json_is_text(service: ThreadService, run: Run) -> None:
    done = freestep(service, "set", run.name, f"lr={'[' * 50_000}")
    assert (done.returncode, done.stderr) == (1, "freestep: optimizer.lr: Input should be a valid number\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lr", "'lr' is not NAME=VALUE"),
        ("=1", "'=1' is not NAME=VALUE"),
        ("a..b=1", "is not NAME=VALUE"),
        ("aggregation=async", "is not NAME=VALUE"),
        ("lr=0.5", "'lr=0.5' sets what another change sets, too"),
        ("lr.name=x", "names a member of what another change sets as a whole"),
        ("paused=true", "'paused=true' names no hyperparameter: freestep pause"),
        ("optimizer.groups={}", "names no hyperparameter: name those of a group"),
    ],
)
def test_what_is_no_change_is_used_wrongly(service: ThreadService, run: Run, change: str, message: str) -> None:
    done = freestep(service, "set", run.name, "lr=0.25", change)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert run.status().control.optimizer == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("algorithm=sgd", "optimizer.algorithm: belongs to the run"),
        ("weight_decay=NaN", "optimizer.weight_decay: Input should be a valid number"),
        ("weight_decay=1e999", "optimizer.weight_decay: Input should be a valid number"),
        ("self=1", "optimizer.self: "),
        ("lrr=1", "there is no hyperparameter 'lrr' to set; adamw_schedule_free has lr, betas, "),
        ("schedule.name=cosine", "there is no hyperparameter 'schedule' to set"),
        ("groups.all.lrr=1", "groups.all.lrr: there is no hyperparameter 'lrr' to set"),
        ("aggregation.size=1", "there is no field 'size' to set; an aggregation has policy, "),
        ("betas=0.9", "optimizer.betas: must be a list of 2 numbers, as [0.9, 0.999]"),
        ("groups.all.betas=[0.9]", "groups.all.betas: must be a list of 2 numbers, as [0.9, 0.999]"),
        ("delay_correction=none", "optimizer.delay_correction: must be a JSON object"),
        ("durability=none", "optimizer.durability: durability is fixed when a run is created"),
        ("shards=2", "a call of its own: freestep runs reshard"),
    ],
)
def test_what_cannot_be_changed_says_why(service: ThreadService, run: Run, change: str, message: str) -> None:
    done = freestep(service, "set", run.name, change)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_worker_is_ended(service: ThreadService, run: Run) -> None:
    assert "w held no lease" in freestep(service, "end-worker", run.name, "w").stdout
    lease = run.lease("w")
    done = freestep(service, "end-worker", run.name, "w", "--ban", "600")
    assert done.stdout.strip() == "the lease of w has ended, and it gets no other for 600 s"
    shown = freestep(service, "runs", "show", run.name).stdout
    assert any("banned by an operator" in line and "w for" in line for line in shown.splitlines())
    assert json.loads(freestep(service, "end-worker", run.name, "w", "--ban", "0", "--json").stdout) == {
        "worker": "w", "ended": False, "suspended_ms": 0,
    }  # fmt: skip
    lease.release()
