"""An optimizer's state as torch's own tools save and restore it: whole, and without a push of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

from freestep import ManifestMismatch, RemoteOptimizer, Run
from trained import saved_residual

Make = Callable[..., RemoteOptimizer]
ENCODED = {"push_dtype": "BF16"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def step(net: nn.Module, optimizer: RemoteOptimizer) -> None:
    optimizer.zero_grad()
    net(torch.full((5, 3), 0.3)).square().sum().backward()
    optimizer.step()


def groups(state: Any) -> Any:
    return state["param_groups"]


@pytest.mark.parametrize("options", [{}, ENCODED])
@pytest.mark.parametrize("how", [StateDictOptions(), StateDictOptions(full_state_dict=True, cpu_offload=True)])
def test_reading_the_state_leaves_the_run_as_it_is(
    remotely: Make, run: Run, options: dict[str, Any], how: StateDictOptions
) -> None:
    net = model()
    optimizer = remotely(net, **options)
    for taken in range(2):
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        state = get_optimizer_state_dict(net, optimizer, options=how)
        get_state_dict(net, optimizer, options=how)
        assert run.status().step == taken
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
        (group,) = groups(state)
        assert (group["run"], group["worker"], group["epoch"], group["step"]) == (run.name, optimizer.worker, 1, taken)
        assert {float(each["step"]) for each in state["state"].values()} == {float(taken)}  # type: ignore[union-attr, index]
        step(net, optimizer)


@pytest.mark.parametrize("options", [{}, ENCODED])
def test_a_state_comes_back_whole_through_torch(remotely: Make, run: Run, options: dict[str, Any]) -> None:
    net = model()
    optimizer = remotely(net, **options)
    for _ in range(3):
        step(net, optimizer)
    state = get_optimizer_state_dict(net, optimizer)
    plain = saved_residual(optimizer) if options else None
    optimizer.close()
    other = model()
    restored = remotely(other, worker="other", **options)
    set_optimizer_state_dict(other, restored, optim_state_dict=state)
    assert run.status().step == 3
    assert restored.worker == groups(state)[0]["worker"]
    assert restored.loaded.step == 3
    if options:
        residual = saved_residual(restored)
        assert torch.equal(residual, plain)
        assert residual.count_nonzero() > 0
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), other.parameters(), strict=True))
    step(other, restored)
    assert run.status().step == 4
    # A second time, from the restored one.
    assert get_optimizer_state_dict(other, restored)["state"].keys() == state["state"].keys()  # type: ignore[union-attr]


def test_a_state_of_another_run_is_refused(remotely: Make, run: Run) -> None:
    net = model()
    optimizer = remotely(net)
    state = get_optimizer_state_dict(net, optimizer)
    groups(state)[0]["run"] = "another"
    with pytest.raises(ManifestMismatch, match="'another'"):
        set_optimizer_state_dict(net, optimizer, optim_state_dict=state)
    step(net, optimizer)
    assert run.status().step == 1


def test_a_state_without_a_place_is_refused(remotely: Make) -> None:
    net = model()
    optimizer = remotely(net)
    foreign = torch.optim.SGD(net.parameters(), lr=0.1).state_dict()
    with pytest.raises(ManifestMismatch):
        optimizer.load_state_dict(foreign)
    step(net, optimizer)
