"""What would train something else than was meant is refused before anything is changed, with what to do instead."""

from __future__ import annotations

import copy
import logging
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import forked
from freestep import (
    Client,
    Closed,
    DtypeOverflow,
    Flat,
    InvalidSpec,
    LocalSteps,
    MalformedRequest,
    ManifestMismatch,
    NoGradients,
    RemoteOptimizer,
    Run,
    RunNotFound,
)
from harness import ThreadService
from ports import free_port

Make = Callable[..., RemoteOptimizer]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def backward(net: nn.Module) -> None:
    net(torch.ones(4, 3)).sum().backward()


def test_a_step_without_any_gradient_is_refused(remotely: Make, run: Run) -> None:
    net = model()
    optimizer = remotely(net)
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(NoGradients, match="allow_empty"):
        optimizer.step()
    with pytest.raises(NoGradients):
        optimizer.step(overlap=True)
    assert run.status().step == 0
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))
    optimizer.step(allow_empty=True)
    assert run.status().step == 1
    backward(net)
    optimizer.step()
    # A gradient for one parameter is enough.
    optimizer.zero_grad()
    net.bias.grad = torch.ones(2)
    optimizer.step()
    assert run.status().step == 3


@pytest.mark.parametrize("call", ["step", "eval", "train"])
def test_a_closed_optimizer_says_so(remotely: Make, run: Run, call: str) -> None:
    net = model()
    optimizer = remotely(net)
    backward(net)
    optimizer.close()
    with pytest.raises(Closed, match="was closed"):
        getattr(optimizer, call)()
    assert run.status().step == 0
    optimizer.close()
    assert optimizer.state_dict()["param_groups"][0]["run"] == run.name


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_optimizer_cannot_be_copied(remotely: Make, duplicate: Callable[[Any], Any]) -> None:
    net = model()
    optimizer = remotely(net)
    with pytest.raises(TypeError, match="state_dict"):
        duplicate(optimizer)
    backward(net)
    optimizer.step()


@pytest.mark.parametrize(
    "parameter",
    [torch.zeros(2, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.zeros(2, device="meta")],
    ids=["complex", "sparse", "meta"],
)
def test_parameters_that_a_run_cannot_hold_are_refused_by_name(
    remotely: Make, run: Run, parameter: torch.Tensor
) -> None:
    with pytest.raises(ManifestMismatch, match="'odd'"):
        remotely([("good", nn.Parameter(torch.zeros(2))), ("odd", nn.Parameter(parameter))])
    with pytest.raises(RunNotFound):
        run.status()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("weight_decy", 0.1, "did you mean 'weight_decay'"),
        ("LR", 0.1, "did you mean 'lr'"),
        ("max_grad_norm", 1.0, "give it to the optimizer"),
        ("algorithm", "sgd", "give it to the optimizer"),
    ],
)
def test_what_a_group_cannot_have_is_refused(remotely: Make, run: Run, key: str, value: Any, said: str) -> None:
    with pytest.raises(InvalidSpec, match=said):
        remotely([{"params": model().parameters(), key: value}])
    with pytest.raises(RunNotFound):
        run.status()


def test_what_a_group_has_of_other_libraries_is_warned_about(remotely: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "freestep"):
        remotely([{"params": model().parameters(), "zzz": 1, "initial_lr": 0.1, "name": "all", "lr": 0.5}])
    (record,) = [each for each in caplog.records if "'zzz'" in each.getMessage()]
    assert "has no effect" in record.getMessage()
    assert "initial_lr" not in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algorithm": "adamw_schedulefree"}, "did you mean 'adamw_schedule_free'"),
        ({"weight_decy": 0.1}, "did you mean 'weight_decay'"),
        ({"zzz": 0.1}, "it has .*lr, momentum"),
        ({"aggregation": "bufered"}, "did you mean 'buffered'"),
        ({"aggregation": {"policy": "zzz"}}, "must be one of async, .*ssp"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    remotely: Make, run: Run, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidSpec, match=said):
        remotely(model(), **options)
    with pytest.raises(RunNotFound):
        run.status()


def sharing() -> list[nn.Parameter]:
    tied = nn.Parameter(torch.ones(3))
    return [tied, nn.Parameter(torch.ones(2)), nn.Parameter(tied.detach())]


def sharing_a_part() -> list[nn.Parameter]:
    vector = torch.ones(6)
    return [nn.Parameter(vector[2:]), nn.Parameter(vector[:4].view(2, 2))]


@torch.inference_mode()
def made_in_inference_mode() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (lambda: [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2, 1).expand(2, 3))], r"0\.1.*expanded"),
        (made_in_inference_mode, r"0\.0.*inference mode"),
        (sharing, r"0\.0.*0\.2.*share memory"),
        (sharing_a_part, r"0\.1.*0\.0.*share memory"),
        (lambda: [nn.Parameter(torch.ones(1)), nn.Parameter(torch.tensor([1.0, torch.nan]))], r"0\.1.*NaN"),
        (lambda: [nn.Parameter(torch.tensor([1e300], dtype=torch.float64))], r"0\.0.*NaN or infinity as fp32"),
    ],
    ids=["expanded", "inference", "sharing", "sharing-a-part", "nan", "beyond-fp32"],
)
def test_parameters_that_cannot_be_trained_are_refused_before_there_is_a_run(
    remotely: Make, run: Run, params: Callable[[], list[nn.Parameter]], said: str
) -> None:
    with pytest.raises(ManifestMismatch, match=said):
        remotely(params())
    with pytest.raises(RunNotFound):
        run.status()


def test_views_of_one_vector_that_do_not_overlap_are_trained(remotely: Make, run: Run) -> None:
    vector = torch.ones(6)
    matrix = torch.ones(3, 2)
    views = [*vector.split(2), *matrix.unbind(1), torch.ones(0), torch.ones(0)]
    optimizer = remotely([each.requires_grad_() for each in views])
    for each in views:
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert not vector.any() and not matrix.any()


def test_a_name_that_no_worker_can_have_is_refused_before_there_is_a_run(
    remotely: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MalformedRequest, match=r"worker: .*at most 200"):
        remotely(model(), worker="a" * 201)
    monkeypatch.setenv("FREESTEP_WORKER", "..")
    with pytest.raises(MalformedRequest, match="worker: "):
        remotely(model())
    with pytest.raises(RunNotFound):
        run.status()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": -1}, "lr"),
        ({"algorithm": "adamw_schedule_free", "betas": (0.9, 1.5)}, "betas.1"),
        ({"algorithm": "sgd", "momentums": 0.9}, "momentums"),
        ({"aggregation": "quorum"}, "aggregation.batch"),
        ({"lease_ttl_ms": 1}, "lease_ttl_ms"),
        ({"shards": 0}, "shards"),
    ],
)
def test_what_no_run_can_have_is_refused_without_a_service(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        RemoteOptimizer(model(), url=f"http://127.0.0.1:{free_port()}", run="r", retry_for=600, **options)
    assert caught.value.extensions["field"] == field


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("abc", "an nn.Module, .* and 'a' is of str"),
        ([nn.Linear(1, 1)], "is of Linear"),
        ([{"params": [nn.Linear(1, 1)]}], "is of Linear"),
        (nn.Parameter(torch.zeros(2)), "put it into a list"),
    ],
    ids=["text", "modules", "groups", "tensor"],
)
def test_what_are_no_parameters_is_refused(remotely: Make, params: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        remotely(params)


@pytest.mark.parametrize("inner", ["adamw", torch.optim.AdamW])
def test_what_is_no_inner_optimizer_is_refused(inner: Any) -> None:
    with pytest.raises(TypeError, match=r"such as torch\.optim\.AdamW"):
        LocalSteps(model(), inner, every=2, url=f"http://127.0.0.1:{free_port()}", run="r", retry_for=600)


def test_an_optimizer_of_a_shared_client_closes_without_it(service: ThreadService, name: str) -> None:
    with Client(service.url) as client:
        optimizer = RemoteOptimizer(model(), run=name, client=client, algorithm="sgd", lr=1.0)
        optimizer.close()
        with pytest.raises(Closed):
            optimizer.step()
        assert client.run(name).status().workers == []


@pytest.mark.parametrize("value", [65504.0, -65504.0, 1e5, -1e5, 3e38])
def test_a_value_that_f16_cannot_hold_is_refused_by_name(
    remotely: Make, service: ThreadService, run: Run, value: float, tmp_path: Path
) -> None:
    net = model()
    with torch.no_grad():
        net.bias[1] = value
    remotely(net).close()
    into = Flat(run.manifest, "F16")
    if abs(value) <= 65504:
        run.pull_into(into, "x")
        assert into.views["bias"][1] == value
        return
    with pytest.raises(DtypeOverflow, match=r"'bias'.*BF16"):
        run.pull_into(into, "x")
    file = tmp_path / "model.safetensors"
    done = forked.freestep("pull", run.name, "-o", str(file), "--dtype", "F16", FREESTEP_URL=service.url)
    assert done.returncode == 1
    assert "'bias'" in done.stderr
    assert not file.exists()
    with pytest.raises(DtypeOverflow):
        remotely(model(), pull_dtype="F16")


def test_a_scheduler_is_warned_about_once(remotely: Make, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    optimizer = remotely(net, lr=0.5)
    with caplog.at_level(logging.WARNING, "freestep"):
        backward(net)
        optimizer.step()
        assert caplog.text == ""
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
    (record,) = [each for each in caplog.records if "no effect" in each.getMessage()]
    assert "0.25" in record.getMessage()
    assert run.status().spec.optimizer.lr == 0.5


def test_parameters_that_were_replaced_are_not_left_untrained(remotely: Make, run: Run) -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    optimizer = remotely(net)
    net(torch.arange(4)).sum().backward()
    optimizer.step()
    net[0] = nn.Embedding.from_pretrained(torch.zeros(7, 3), freeze=False)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.arange(4)).sum().backward()
        with pytest.raises(ManifestMismatch, match=r"'0\.weight' was replaced"):
            optimizer.step()
    assert run.status().step == 1


def test_a_parametrization_of_a_trained_parameter_is_refused(remotely: Make, run: Run) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = remotely(net)
    nn.utils.parametrizations.weight_norm(net[0])
    backward(net)
    with pytest.raises(ManifestMismatch, match="was replaced or added"):
        optimizer.step()
    assert run.status().step == 0


def test_a_parameter_may_go_without_a_gradient_for_some_steps(remotely: Make, run: Run) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = remotely(net)
    for used in (net, net[0], net[0], net):
        optimizer.zero_grad()
        before = net[1].bias.clone()
        used(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        assert torch.equal(net[1].bias, before) is (used is not net)
    assert run.status().step == 4


def test_a_half_model_is_not_given_infinities(remotely: Make, run: Run) -> None:
    net = model()
    remotely(net, worker="exact")
    half = model().half()
    optimizer = remotely(half, worker="half")
    before = [parameter.clone() for parameter in half.parameters()]
    half.bias.grad = torch.full((2,), -60000.0, dtype=torch.float16)
    for _ in range(2):
        with pytest.raises(DtypeOverflow, match="'bias' is F16 in the model") if run.status().step else nullcontext():
            optimizer.step()
    assert all(parameter.isfinite().all() for parameter in half.parameters())
    assert not torch.equal(half.bias, before[1])


def test_other_hyperparameters_in_a_group_are_warned_about(remotely: Make, caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    optimizer = remotely(net, algorithm="adamw_schedule_free", lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = 9.0
    with caplog.at_level(logging.WARNING, "freestep"):
        for _ in range(2):
            backward(net)
            optimizer.step()
    (record,) = [each for each in caplog.records if "no effect" in each.getMessage()]
    assert "weight_decay was set to 9.0" in record.getMessage()


@pytest.mark.parametrize("value", [np.float64(0.25), np.array(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_hyperparameters_may_be_numbers_of_other_libraries(remotely: Make, run: Run, value: Any) -> None:
    remotely(model(), lr=value)
    spec = run.status().spec.optimizer.model_dump()
    assert (spec["lr"], type(spec["lr"])) == (0.25, float)


def test_a_new_layer_is_not_left_untrained(remotely: Make) -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    optimizer = remotely(net)
    backward(net)
    optimizer.step()
    net.append(nn.Linear(3, 2))
    with pytest.raises(ManifestMismatch, match=r"'1\.weight' was replaced or added"):
        for _ in range(20):
            optimizer.zero_grad()
            backward(net)
            optimizer.step()


def test_gradients_that_were_taken_at_x_are_not_pushed(
    remotely: Make, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    net = model()
    optimizer = remotely(net)
    backward(net)
    optimizer.eval()
    # Of these nothing came at x.
    optimizer.train()
    assert net.bias.grad is not None
    optimizer.eval()
    backward(net)
    with caplog.at_level(logging.WARNING, "freestep"):
        optimizer.train()
    assert "taken at x are discarded" in caplog.text
    with pytest.raises(NoGradients):
        optimizer.step()
    backward(net)
    optimizer.step()
    assert run.status().step == 1


@pytest.mark.parametrize("clears", ["by the optimizer", "in place", "by the model"])
def test_gradients_from_before_an_evaluation_are_as_stale_as_they_are(remotely: Make, run: Run, clears: str) -> None:
    net, other = model(), model()
    optimizer = remotely(net, aggregation={"policy": "async", "max_staleness": 2})
    others = remotely(other, worker="other")

    def clear() -> None:
        if clears == "by the model":
            net.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=clears == "by the optimizer")

    def evaluate(steps: int) -> None:
        """While another worker takes steps."""
        optimizer.eval()
        for _ in range(steps):
            others.zero_grad()
            backward(other)
            others.step()
        optimizer.train()

    def step() -> tuple[str, int]:
        backward(net)
        optimizer.step()
        assert optimizer.receipt is not None
        return optimizer.receipt.decision, optimizer.receipt.staleness

    assert step() == ("applied", 0)
    # Of gradients that were pushed nothing is left.
    evaluate(3)
    clear()
    backward(net)
    evaluate(1)
    evaluate(1)
    assert step() == ("applied", 2)
    clear()
    backward(net)
    evaluate(3)
    assert step() == ("dropped", 3)
    # Cleared, they do not count.
    clear()
    backward(net)
    evaluate(3)
    optimizer.zero_grad()
    assert step() == ("applied", 0)
    net.zero_grad(set_to_none=False)
    evaluate(3)
    assert step() == ("applied", 0)


def test_a_parameter_that_was_unfrozen_is_named(remotely: Make) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    optimizer = remotely(net)
    net[0].requires_grad_(True)
    net[1].requires_grad_(False)
    backward(net)
    with pytest.raises(ManifestMismatch, match="no longer requires a gradient"):
        optimizer.step()


def test_a_fork_does_not_wait_for_its_parents_push(remotely: Make) -> None:
    net = model()
    optimizer = remotely(net)
    backward(net)
    optimizer.step(overlap=True)
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (optimizer.flush, optimizer.step, optimizer.eval):
            try:
                call()
            except Closed:
                refused += 1
        optimizer.close()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    optimizer.flush()


@pytest.mark.parametrize("wrong", [None, [], "state"])
def test_what_is_no_state_is_refused(remotely: Make, wrong: Any) -> None:
    optimizer = remotely(model())
    with pytest.raises(ManifestMismatch):
        optimizer.load_state_dict(wrong)
