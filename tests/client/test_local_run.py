"""Runs with url="local": what a service would do, in the process, to the bit; and what they cannot do is refused."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from freestep import (
    AggregationSpec,
    Client,
    Closed,
    DtypeOverflow,
    Flat,
    FreestepError,
    InvalidSpec,
    LocalSteps,
    MalformedRequest,
    ManifestMismatch,
    NonFiniteGradient,
    RemoteOptimizer,
    Run,
    RunNotInitialized,
    RunSpec,
    StepNotReached,
)
from freestep.connect import open_run
from freestep.lease import Claim
from freestep.local_run import LocalRun
from freestep.wire.manifest import Manifest
from freestep.worker_group import WorkerGroup
from harness import ThreadService
from trained import Counting, held, network, step

Make = Callable[..., RemoteOptimizer]

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.05},
    "BF16": {"push_dtype": "BF16", "pull_dtype": "BF16"},
    "F16": {"push_dtype": "F16", "pull_dtype": "F16", "error_feedback": False},
    "int8": {"push_encoding": "int8", "pull_dtype": "I8"},
    "topk": {"push_encoding": "topk", "topk_fraction": 0.3},
    "sync": {"aggregation": "sync"},
    "buffered": {"aggregation": {"policy": "buffered", "batch": 3}},
    "rennala": {"aggregation": AggregationSpec(policy="rennala", batch=2)},
    "ssp": {"aggregation": {"policy": "ssp", "slack": 1}},
    "damped": {"aggregation": {"policy": "async", "staleness_damping": "inverse_sqrt"}},
    "corrected": {"delay_correction": {"name": "constant", "expected_staleness": 2.0}},
    "ahead": {"delay_correction": {"name": "ahead", "expected_staleness": 2.0}},
}


def made(**options: Any) -> tuple[nn.Module, RemoteOptimizer]:
    model = network()
    return model, RemoteOptimizer(model, **{"lr": 0.05, "weight_decay": 0.1, **options})


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_local_run_is_a_services_run_to_the_bit(service: ThreadService, name: str, form: str, overlap: bool) -> None:
    if overlap and form in ("sync", "rennala"):
        pytest.skip("the policy takes no stale gradient")
    model, local = made(url="local", **FORMS[form])
    other, remote = made(url=service.url, run=name, **FORMS[form])
    with local, remote:
        for number in range(8):
            step(model, local, number, overlap=overlap)
            step(other, remote, number, overlap=overlap)
            assert local.receipt == remote.receipt
            assert local.loaded == remote.loaded
            assert torch.equal(held(model), held(other))
        local.eval()
        remote.eval()
        assert torch.equal(held(model), held(other))
        local.train()
        remote.train()
        assert torch.equal(held(model), held(other))


def saved(optimizer: RemoteOptimizer) -> dict[str, Any]:
    """Its state, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file)
    return state


@pytest.mark.parametrize("form", ["plain", "int8", "buffered", "corrected"])
def test_a_state_dict_holds_the_whole_run(form: str) -> None:
    model, optimizer = made(url="local", **FORMS[form])
    for number in range(4):
        step(model, optimizer, number)
    state = saved(optimizer)
    for number in range(4, 8):
        step(model, optimizer, number)
    other, restored = made(url="local", **FORMS[form])
    step(other, restored, 99)
    restored.load_state_dict(state)
    for number in range(4, 8):
        step(other, restored, number)
    assert restored.receipt == optimizer.receipt
    assert torch.equal(held(model), held(other))
    # An earlier state, into a run that has gone on; what was loaded has not changed.
    restored.load_state_dict(state)
    assert restored.loaded.step == state["local"]["step"]
    for number in range(4, 8):
        step(other, restored, number)
    assert torch.equal(held(model), held(other))


@pytest.mark.parametrize("form", ["plain", "buffered", "corrected"])
def test_a_local_run_goes_on_at_a_service(run: Run, service: ThreadService, form: str) -> None:
    model, local = made(url="local", **FORMS[form])
    for number in range(6):
        step(model, local, number)
    state = local.export_state()
    assert (state.step, state.spec) == (local.loaded.step, local.spec)
    run.import_state(state)
    other, remote = made(url=service.url, run=run.name)
    with remote:
        assert torch.equal(held(model), held(other))
        for number in range(6, 12):
            step(model, local, number)
            step(other, remote, number)
            assert torch.equal(held(model), held(other))
        assert remote.export_state().scalars == local.export_state().scalars
    local.close()
    with pytest.raises(Closed):
        local.export_state()


def test_a_state_of_another_run_is_refused(service: ThreadService, name: str) -> None:
    model, local = made(url="local", run=name)
    step(model, local, 0)
    _, remote = made(url=service.url, run=name)
    with remote, pytest.raises(ManifestMismatch, match="url='local'"):
        remote.load_state_dict(local.state_dict())
    with pytest.raises(ManifestMismatch, match="no local run"):
        local.load_state_dict(remote.state_dict())
    _, slower = made(url="local", run=name, lr=0.01)
    with pytest.raises(ManifestMismatch, match="other optimizer"):
        local.load_state_dict(slower.state_dict())
    assert local.loaded.step == 1
    step(model, local, 1)
    assert local.receipt is not None and local.receipt.step == 2


def test_a_state_without_the_run_in_it_is_refused() -> None:
    """That of torch.distributed.checkpoint has what the optimizer's `state` and `param_groups` have."""
    model, optimizer = made(url="local")
    step(model, optimizer, 0)
    state = get_optimizer_state_dict(model, optimizer)
    with pytest.raises(ManifestMismatch, match="no local run"):
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state)
    step(model, optimizer, 1)
    assert optimizer.receipt is not None and optimizer.receipt.step == 2


def test_a_refused_push_changes_nothing() -> None:
    for form in ("plain", "int8"):
        model, optimizer = made(url="local", **FORMS[form])
        step(model, optimizer, 0)
        before = optimizer.state_dict()["local"]
        for value in (float("nan"), float("inf"), 1e30):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, value)
            with pytest.raises(NonFiniteGradient):
                optimizer.step()
        after = optimizer.state_dict()["local"]
        assert all(torch.equal(before["tensors"][key], tensor) for key, tensor in after["tensors"].items())
        assert (after["step"], after["scalars"]) == (before["step"], before["scalars"])
        step(model, optimizer, 1)
        assert held(model).isfinite().all()


def test_scheduled_free_plus_needs_a_loss() -> None:
    model, optimizer = made(url="local", algorithm="adamc_schedule_free_plus", lr=1.0)
    with pytest.raises(InvalidSpec, match="loss"):
        step(model, optimizer, 0)
    step(model, optimizer, 0, loss=0.5)
    assert optimizer.receipt is not None and optimizer.receipt.step == 1


def test_a_value_that_f16_cannot_hold_is_refused() -> None:
    model = Counting()
    optimizer = RemoteOptimizer(model, url="local", algorithm="sgd", lr=1.0, pull_dtype="F16")
    with pytest.raises(DtypeOverflow):
        model.step(optimizer, value=1e5)


@pytest.mark.parametrize("policy", [{"policy": "quorum", "batch": 2}, {"policy": "sync", "batch": 2}])
def test_a_policy_that_waits_for_others_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match="needs 2 workers"):
        made(url="local", aggregation=policy)
    model, optimizer = made(url="local", aggregation={"policy": "quorum", "batch": 1})
    step(model, optimizer, 0)
    assert optimizer.receipt is not None and optimizer.receipt.step == 1


def test_local_steps_train_locally_too() -> None:
    model = Counting()
    inner = model.sgd
    with LocalSteps(
        model, inner, every=3, dynamic=True, url="local", algorithm="diloco", lr=1.0, momentum=0.0
    ) as optimizer:
        model.step(optimizer, 3)
        assert optimizer.receipt is not None and optimizer.receipt.step == 1
        assert (model.counted, optimizer.length) == (3, 3)


class Two(WorkerGroup):
    size = 2


def test_where_a_run_lives(monkeypatch: pytest.MonkeyPatch, service: ThreadService) -> None:
    for variable in ("FREESTEP_RUN", "FREESTEP_URL"):
        monkeypatch.delenv(variable, raising=False)
    group = WorkerGroup()
    with pytest.raises(FreestepError, match=r"run='\.\.\.'.*FREESTEP_RUN"):
        made(url=service.url)
    with pytest.raises(FreestepError, match="process_group"):
        open_run(None, "local", None, None, None, Two())
    local, client = open_run(None, "local", None, None, None, group)
    assert (local.name, client, isinstance(local, LocalRun)) == ("local", None, True)
    monkeypatch.setenv("FREESTEP_URL", "local")
    monkeypatch.setenv("FREESTEP_RUN", "named")
    assert isinstance(open_run(None, None, None, None, None, group)[0], LocalRun)
    run, client = open_run(None, service.url, None, None, None, group)
    assert client is not None
    with client:
        assert (run.name, isinstance(run, Run)) == ("named", True)
        assert open_run("given", None, None, client, None, group)[0].name == "given"
        assert open_run("given", None, None, client, None, group)[1] is None


def test_a_client_cannot_reach_a_local_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREESTEP_URL", "local")
    with pytest.raises(FreestepError, match="in its optimizer's process"):
        Client()


def test_without_the_services_package_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['freestep_service'] = None\n"
        "import freestep, torch\n"
        "try: freestep.RemoteOptimizer(torch.nn.Linear(1, 1), url='local')\n"
        "except freestep.FreestepError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'freestep[service]'" in done.stdout


# The run itself


def created(policy: dict[str, Any]) -> tuple[LocalRun, Flat]:
    run = LocalRun("any")
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "sgd", "lr": 1.0},
            "aggregation": policy,
            "parameters": [{"name": "w", "shape": [3]}],
        }
    )
    run.create(spec)
    flat = Flat(Manifest.of(spec))
    with pytest.raises(RunNotInitialized):
        run.pull_into(flat)
    run.initialize(flat)
    run.lease("only")
    return run, flat


def ones(flat: Flat, value: float = 1.0) -> Flat:
    flat.vector.fill_(value)
    return flat


def pushed(run: LocalRun, gradient: Flat, claim: Claim) -> tuple[str, str | None, int, int, Tensor]:
    y = Flat(gradient.manifest)
    receipt, pulled = run.exchange(ones(gradient), claim, y)
    assert pulled.step == run.status().step
    return receipt.decision, receipt.reason, receipt.step, receipt.staleness, y.vector


@pytest.mark.parametrize(
    ("policy", "most"),
    [({"policy": "ringmaster"}, 4), ({"policy": "async", "max_staleness": 1}, 1), ({"policy": "async"}, 9)],
)
def test_a_stale_push_is_dropped(policy: dict[str, Any], most: int) -> None:
    run, flat = created(policy)
    for number in range(9):
        pushed(run, flat, Claim("local", 1, number))
    decision, reason, step, staleness, y = pushed(run, flat, Claim("local", 1, 9 - most))
    assert (decision, reason, step, staleness) == ("applied", None, 10, most)
    assert torch.equal(y, torch.full((3,), -10.0))
    if most == 9:
        return
    decision, reason, step, staleness, y = pushed(run, flat, Claim("local", 1, 9 - most))
    assert (decision, reason, step, staleness) == ("dropped", "stale", 10, most + 1)
    assert torch.equal(y, torch.full((3,), -10.0))
    assert run.status().pushes == {"applied": 10, "accumulated": 0, "dropped": 1}


def test_a_repeated_push_counts_once() -> None:
    run, flat = created({"policy": "async"})
    claim = Claim("local", 1, 0, speed=2.0)
    first, _ = run.exchange(ones(flat), claim, Flat(flat.manifest))
    again, pulled = run.exchange(ones(flat), claim, Flat(flat.manifest))
    assert (first.replayed, again.replayed) == (False, True)
    assert (again.step, pulled.step, run.status().pushes["applied"]) == (1, 1, 1)
    (worker,) = run.workers()
    assert (worker.worker, worker.pushes, worker.step, worker.speed) == ("only", 1, 0, 2.0)


def test_a_step_that_has_not_been_reached_is_said() -> None:
    run, flat = created({"policy": "async"})
    with pytest.raises(StepNotReached):
        run.pull_into(flat, "y", min_step=1)


@pytest.mark.parametrize("options", [{"loss": float("inf")}, {"loss": float("nan")}, {"samples": 0}, {"samples": -1}])
def test_what_a_service_refuses_of_a_push_is_refused(options: dict[str, float]) -> None:
    run, flat = created({"policy": "async"})
    with pytest.raises(MalformedRequest):
        pushed(run, flat, Claim("local", 1, 0, **options))
    assert run.status().step == 0


@pytest.mark.parametrize("samples", [0, -1])
def test_a_refused_step_leaves_the_model_as_it_was(samples: int) -> None:
    model, optimizer = made(url="local")
    step(model, optimizer, 0)
    before = held(model)
    with pytest.raises(MalformedRequest):
        step(model, optimizer, 1, samples=samples)
    assert torch.equal(held(model), before)
    step(model, optimizer, 1)
