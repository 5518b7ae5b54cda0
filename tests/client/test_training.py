"""What training loops do between two steps: accumulation, mixed precision, freezing, sharing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

from freestep import ManifestMismatch, RemoteOptimizer, Run
from trained import assert_same, loss_of, network


@pytest.fixture
def make(make: Callable[..., RemoteOptimizer]) -> Callable[..., RemoteOptimizer]:
    """With the learning rate of the package's optimizer."""
    return partial(make, lr=0.01)


def peer_of(model: nn.Module) -> tuple[Any, Any]:
    """A copy of a model, and the package's optimizer of it."""
    twin = copy.deepcopy(model)
    peer = schedulefree.AdamWScheduleFree([each for each in twin.parameters() if each.requires_grad], lr=0.01)
    peer.train()
    return twin, peer


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_add_up_over_several_backwards(make: Callable[..., RemoteOptimizer], set_to_none: bool) -> None:
    model = network()
    twin, peer = peer_of(model)
    optimizer = make(model)
    for step in range(5):
        for each, its in ((model, optimizer), (twin, peer)):
            for part in range(4):
                (loss_of(each, 4 * step + part) / 4).backward()
            nn.utils.clip_grad_norm_(each.parameters(), 0.1)
            its.step()
            its.zero_grad(set_to_none=set_to_none)
    assert_same(model, twin)
    assert optimizer.receipt is not None
    assert optimizer.receipt.step == 5


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_whose_gradients_overflowed_is_not_pushed(
    make: Callable[..., RemoteOptimizer], run: Run, overlap: bool
) -> None:
    model = network()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for number in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, number)
        scaler.scale(loss * (float("inf") if number == 3 else 1.0)).backward()
        before = [each.detach().clone() for each in model.parameters()]
        scaler.step(optimizer, loss=loss.detach(), overlap=overlap)
        if number == 3:
            assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
        scaler.update()
    optimizer.flush()
    assert scaler.get_scale() == 2.0
    status = run.status()
    assert (status.step, status.pushes["applied"]) == (5, 5)


def test_a_scaled_loss_trains_as_one_that_is_not(make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    twin, peer = peer_of(model)
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, number)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        peer.zero_grad()
        loss_of(twin, number).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        peer.step()
    assert_same(model, twin)


def test_tied_weights_get_the_gradients_of_all_their_uses(make: Callable[..., RemoteOptimizer]) -> None:
    def tied() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model

    model, twin = tied(), tied()
    peer = schedulefree.AdamWScheduleFree(twin.parameters(), lr=0.01)
    peer.train()
    optimizer = make(model)
    for number in range(5):
        for each, its in ((model, optimizer), (twin, peer)):
            its.zero_grad()
            loss_of(each, number).backward()
            its.step()
    assert model[2].weight is model[0].weight
    assert_same(model, twin)


def test_frozen_parameters_stay_what_they_are(make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    model[0].requires_grad_(False)
    twin, peer = peer_of(model)
    optimizer = make(model)
    for number in range(5):
        for each, its in ((model, optimizer), (twin, peer)):
            its.zero_grad()
            loss_of(each, number).backward()
            its.step()
    assert_same(model, twin)


def step(model: nn.Module, optimizer: RemoteOptimizer, number: int) -> None:
    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_parameter_that_is_frozen_later_is_said_to_be_the_runs(
    make: Callable[..., RemoteOptimizer], run: Run, overlap: bool
) -> None:
    model = network()
    optimizer = make(model)
    step(model, optimizer, 0)
    model[0].bias.requires_grad_(False)
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    with pytest.raises(ManifestMismatch, match=r"'0\.bias' no longer requires a gradient"):
        optimizer.step(overlap=overlap)
    assert run.status().step == 1
    model[0].bias.requires_grad_(True)
    step(model, optimizer, 2)
    assert run.status().step == 2


@pytest.mark.parametrize(
    ("form", "called"),
    [
        (lambda model: model, r"the parameter '0\.bias'"),
        (lambda model: model.named_parameters(), r"the parameter '0\.bias'"),
        (lambda model: model.parameters(), r"a parameter of shape \[5\]"),
        (lambda model: [{"params": model[0].parameters()}, {"params": model[2].weight}], r"a parameter of shape \[5\]"),
    ],
)
def test_a_frozen_parameter_that_gets_a_gradient_is_said_not_to_be_the_runs(
    make: Callable[..., RemoteOptimizer],
    run: Run,
    form: Callable[[nn.Module], Any],
    called: str,
) -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    optimizer = make(form(model))
    step(model, optimizer, 0)
    model[0].bias.requires_grad_(True)
    with pytest.raises(ManifestMismatch, match=f"{called} has a gradient, but was frozen"):
        step(model, optimizer, 1)
    assert run.status().step == 1
    model[0].bias.requires_grad_(False)
    step(model, optimizer, 2)
    assert run.status().step == 2


def test_sparse_gradients_are_pushed_as_dense_ones(make: Callable[..., RemoteOptimizer]) -> None:
    torch.manual_seed(0)
    model, indices = nn.Embedding(20, 4, sparse=True), torch.tensor([3, 3, 7])
    begun = model.weight.detach().clone()
    optimizer = make(model, algorithm="sgd", lr=1.0)
    model(indices).sum().backward()
    optimizer.step()
    expected = torch.zeros(20, 4)
    expected[3], expected[7] = 2.0, 1.0
    torch.testing.assert_close(begun - model.weight.detach(), expected)


def test_a_loss_that_was_set_is_that_of_the_next_push_alone(make: Callable[..., RemoteOptimizer], run: Run) -> None:
    model = network()
    optimizer = make(model)
    optimizer.loss = torch.tensor(1.5)
    step(model, optimizer, 0)
    assert (run.status().loss, optimizer.loss) == (1.5, None)
    step(model, optimizer, 1)
    assert run.status().loss == 1.5


def test_a_group_of_frozen_parameters_may_stand_beside_others(make: Callable[..., RemoteOptimizer]) -> None:
    """As the groups of decay and no decay, where all biases are frozen."""
    model = network()
    model[0].bias.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    named = list(model.named_parameters())
    optimizer = make([{"params": named[::2]}, {"params": iter(named[1::2]), "weight_decay": 0.0}])
    before = model[0].bias.clone()
    step(model, optimizer, 0)
    assert torch.equal(model[0].bias, before)
    assert [group["param_names"] for group in optimizer.param_groups] == [["0.weight", "2.weight"], []]
    model[2].bias.requires_grad_(True)
    with pytest.raises(ManifestMismatch, match=r"'2\.bias' has a gradient, but was frozen"):
        step(model, optimizer, 1)
