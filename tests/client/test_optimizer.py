"""RemoteOptimizer against the packages run in this process, alone and together with others."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

from freestep import (
    EvalMode,
    Flat,
    FreestepError,
    InvalidSpec,
    ManifestMismatch,
    NonFiniteGradient,
    RemoteOptimizer,
    Run,
)
from meanwhile import at_once, under_way, wait_until
from trained import assert_same, batches, loss_of, network, step, train


def wrapped_sgd(params: Iterable[nn.Parameter], base: dict[str, Any], **options: Any) -> torch.optim.Optimizer:
    inner = torch.optim.SGD(params, lr=base["lr"], momentum=base["momentum"])
    wrapper: torch.optim.Optimizer = schedulefree.ScheduleFreeWrapper(inner, **options)
    return wrapper


@pytest.mark.parametrize(
    ("algorithm", "package", "options"),
    [
        ("adamw_schedule_free", schedulefree.AdamWScheduleFree, {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 10}),
        ("sgd_schedule_free", schedulefree.SGDScheduleFree, {"lr": 0.02}),
        ("radam_schedule_free", schedulefree.RAdamScheduleFree, {"lr": 0.01}),
        (
            "schedule_free_wrapper",
            wrapped_sgd,
            {"base": {"algorithm": "sgd", "lr": 0.003, "momentum": 0.9}, "weight_decay_at_y": 0.1},
        ),
    ],
)
def test_one_worker_is_the_package(
    make: Callable[..., RemoteOptimizer], algorithm: str, package: type[Any], options: dict[str, Any]
) -> None:
    model = network()
    twin = copy.deepcopy(model)
    peer = package(twin.parameters(), **options)
    peer.train()
    optimizer = make(model, algorithm=algorithm, **options)
    train(model, optimizer)
    train(twin, peer)
    assert_same(model, twin)
    optimizer.eval()
    peer.eval()
    assert_same(model, twin)
    optimizer.train()
    peer.train()
    train(model, optimizer, 5)
    train(twin, peer, 5)
    assert_same(model, twin)
    assert optimizer.loaded.step == 45


def test_a_param_group_overrules_members_of_its_base(make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    groups = [
        {"params": list(model[0].named_parameters(prefix="0"))},
        {"params": list(model[2].named_parameters(prefix="2")), "base": {"lr": 0.5}},
    ]
    optimizer = make(groups, algorithm="schedule_free_wrapper", base={"algorithm": "adam", "lr": 0.01, "eps": 1e-6})
    spec = optimizer._run.status().spec
    chosen = [spec.hyperparameters(group).model_dump()["base"] for group in ("group0", "group1")]
    assert [(base["lr"], base["eps"]) for base in chosen] == [(0.01, 1e-6), (0.5, 1e-6)]


def test_param_groups_keep_their_hyperparameters(make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    twin = copy.deepcopy(model)

    def groups(of: nn.Sequential, named: bool) -> list[dict[str, Any]]:
        parts = [list(of[0].named_parameters(prefix="0")), list(of[2].named_parameters(prefix="2"))]
        first, second = parts if named else [[parameter for _, parameter in part] for part in parts]
        return [{"params": first}, {"params": second, "lr": 0.001, "weight_decay": 0.5}]

    peer = schedulefree.AdamWScheduleFree(groups(twin, named=False), lr=0.01)
    peer.train()
    optimizer = make(groups(model, named=True), lr=0.01)
    assert [parameter.name for parameter in optimizer.spec.parameters] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert optimizer.spec.groups["group1"] == {"lr": 0.001, "weight_decay": 0.5}
    train(model, optimizer)
    train(twin, peer)
    assert_same(model, twin)


def test_parameters_come_in_all_the_forms_torch_takes(make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    named = [name for name, _ in model.named_parameters()]
    forms = [model, model.named_parameters(), model.parameters(), [{"params": model.parameters(), "name": "all"}]]
    names = [
        [parameter.name for parameter in make(form, run=f"forms-{number}-{uuid.uuid4().hex[:6]}").spec.parameters]
        for number, form in enumerate(forms)
    ]
    numbered = [f"group0.{index}" for index in range(4)]
    assert names == [named, named, numbered, numbered]


def test_frozen_parameters_stay_out_and_unused_ones_push_zeros(make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    model[0].requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    frozen = model[0].weight.clone()
    optimizer = make([*model.named_parameters(), ("unused", unused)], algorithm="sgd_schedule_free", lr=0.1)
    assert [parameter.name for parameter in optimizer.spec.parameters] == ["2.weight", "2.bias", "unused"]
    train(model, optimizer, 5)
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(unused.detach(), torch.ones(3))


def test_tied_weights_are_one_parameter(make: Callable[..., RemoteOptimizer]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    optimizer = make(model)
    assert [parameter.name for parameter in optimizer.spec.parameters] == ["0.weight", "0.bias", "1.bias"]
    train(model, optimizer, 3)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_narrow_model_has_fp32_masters(make: Callable[..., RemoteOptimizer], run: Run, dtype: str) -> None:
    model = network().bfloat16()
    optimizer = make(model, lr=1e-5, push_dtype=dtype, pull_dtype=dtype)
    for inputs in batches(3):
        optimizer.zero_grad()
        model(inputs.bfloat16()).square().sum().backward()
        optimizer.step()
    y, _ = run.pull("y")
    master, held = y["0.weight"], model[0].weight
    assert held.dtype == torch.bfloat16
    assert not torch.equal(master, master.bfloat16().float())
    torch.testing.assert_close(held.float(), master, rtol=1e-2, atol=1e-2)


def test_a_worker_holds_two_vectors(make: Callable[..., RemoteOptimizer]) -> None:
    optimizer = make(network())
    train(network(), optimizer, 0)
    kept = [*vars(optimizer).values(), *vars(optimizer._gradients).values()]
    assert sum(isinstance(value, Flat) for value in kept) == 2


def test_a_step_at_x_is_an_error(make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    optimizer = make(model)
    optimizer.eval()
    with pytest.raises(EvalMode, match="train\\(\\)"):
        optimizer.step()
    optimizer.eval()
    optimizer.train()
    train(model, optimizer, 1)


def test_a_closure_is_evaluated(make: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    optimizer = make(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 6)).square().sum()
        loss.backward()
        return loss.detach()

    loss = optimizer.step(closure)
    assert loss is not None
    assert run.status().loss == pytest.approx(float(loss))


def test_a_second_worker_takes_over_the_runs_weights(make: Callable[..., RemoteOptimizer]) -> None:
    first, second = network(0), network(1)
    train(first, make(first, worker="first"), 5)
    optimizer = make(second, worker="second")
    assert_same(first, second)
    assert optimizer.loaded.step == 5


def test_other_parameters_are_refused(make: Callable[..., RemoteOptimizer]) -> None:
    make(network())
    for wrong in (nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))):
        with pytest.raises(ManifestMismatch):
            make(wrong)


def test_other_hyperparameters_are_the_runs_and_said_so(
    make: Callable[..., RemoteOptimizer], caplog: pytest.LogCaptureFixture
) -> None:
    make(network(), lr=0.25)
    with caplog.at_level(logging.WARNING, logger="freestep"):
        optimizer = make(network(), lr=0.5)
    assert "another spec" in caplog.text
    assert optimizer.spec.optimizer.lr == 0.25


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"lr": -1.0}, "lr"),
        ({"algorithm": "adagrad"}, "optimizer.algorithm"),
        ({"aggregation": "quorum"}, "aggregation.batch"),
    ],
)
def test_a_wrong_option_is_named(make: Callable[..., RemoteOptimizer], options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        make(network(), **options)
    assert caught.value.extensions["field"] == field


def test_gradients_that_are_not_finite_are_refused_and_training_goes_on(
    make: Callable[..., RemoteOptimizer],
) -> None:
    model = network()
    optimizer = make(model)
    model(torch.full((1, 6), float("nan"))).sum().backward()
    with pytest.raises(NonFiniteGradient):
        optimizer.step()
    train(model, optimizer, 1)
    assert optimizer.receipt is not None
    assert optimizer.receipt.step == 1


@pytest.mark.parametrize("loss", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_leaves_the_push_to_its_gradient(
    make: Callable[..., RemoteOptimizer], run: Run, loss: float
) -> None:
    model = network()
    optimizer = make(model)
    step(model, optimizer, 0, loss=loss)
    assert (run.status().step, run.status().loss) == (1, None)
    (loss_of(model, 1) * torch.nan).backward()
    with pytest.raises(NonFiniteGradient):
        optimizer.step(loss=loss)


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 3)])
def test_a_loss_for_each_sample_is_refused_and_pushes_nothing(
    make: Callable[..., RemoteOptimizer], run: Run, shape: tuple[int, ...]
) -> None:
    model = network()
    optimizer = make(model)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="give the batch's mean"):
        optimizer.step(loss=torch.ones(shape))
    optimizer.loss = torch.ones(1, 1)
    optimizer.step()
    assert (run.status().step, run.status().loss) == (1, 1.0)


def test_sync_workers_step_together(make: Callable[..., RemoteOptimizer]) -> None:
    models = [network(), network()]
    optimizers = [make(model, aggregation="sync", worker=f"w{number}") for number, model in enumerate(models)]
    twin = network()
    peer = schedulefree.AdamWScheduleFree(twin.parameters(), lr=0.0025)
    peer.train()

    def work(number: int) -> None:
        for inputs in batches(10):
            optimizers[number].zero_grad()
            models[number](inputs.chunk(2)[number]).square().sum().backward()
            optimizers[number].step()

    at_once(*(partial(work, number) for number in range(2)))
    for inputs in batches(10):
        peer.zero_grad()
        (twin(inputs).square().sum() / 2).backward()
        peer.step()
    for model, optimizer in zip(models, optimizers, strict=True):
        assert optimizer.loaded.step == 10
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_worker_that_is_in_the_group_already_waits_for_its_update(
    make: Callable[..., RemoteOptimizer], run: Run
) -> None:
    model = network()
    optimizer = make(model, aggregation="sync", worker="restarted")
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    other = run.lease("other")
    with run.lease("restarted") as before:
        assert run.push(zeros, before.claim(0)).decision == "accumulated"
    waiting = under_way(partial(train, model, optimizer, 1))
    wait_until(lambda: run.status().pushes["dropped"] == 1)
    assert run.push(zeros, other.claim(0)).decision == "applied"
    waiting.result()
    other.release()
    assert optimizer.receipt is not None
    assert optimizer.receipt.reason == "duplicate-worker"
    assert optimizer.loaded.step == 1


def test_a_runs_parameters_are_fixed(make: Callable[..., RemoteOptimizer]) -> None:
    optimizer = make(network())
    with pytest.raises(FreestepError, match="fixed"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
