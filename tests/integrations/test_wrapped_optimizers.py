"""The wrappers of Lightning and Fabric, instances of subclasses made at run time, act on the one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from freestep import Closed, EvalMode, FreestepError, LocalSteps, RemoteOptimizer, Run
from harness import ThreadService
from lightning_module import QUIET, WITH_ITS_WARNINGS, loader
from trained import held, loss_of, network, pulled, saved_residual

pytestmark = WITH_ITS_WARNINGS

Make = Callable[..., Any]
Scene = Callable[[nn.Module, Any], None]
Stage = Callable[[nn.Module, RemoteOptimizer, Scene], None]


class Played(LightningModule):
    """Plays a scene with the optimizer that Lightning gives its modules."""

    def __init__(self, model: nn.Module, optimizer: RemoteOptimizer, scene: Scene) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.optimizer = optimizer
        self.scene = scene

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.scene(self.model, self.optimizers())


@pytest.fixture(params=["lightning", "fabric"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    """Plays a scene with an optimizer in its wrapper."""

    def by_lightning(model: nn.Module, optimizer: RemoteOptimizer, scene: Scene) -> None:
        options = {**QUIET, "max_steps": 1, "limit_train_batches": 1}
        Trainer(default_root_dir=tmp_path, **options).fit(Played(model, optimizer, scene), loader())

    def by_fabric(model: nn.Module, optimizer: RemoteOptimizer, scene: Scene) -> None:
        wrapped = Fabric(accelerator="cpu", devices=1).setup(model, optimizer)
        scene(*wrapped)

    return by_lightning if request.param == "lightning" else by_fabric


@pytest.fixture
def make(service: ThreadService, name: str) -> Iterator[Make]:
    """Makes optimizers of one run; they are closed with the test."""
    made: list[RemoteOptimizer] = []

    def optimizer(model: nn.Module, *inner: Any, **options: Any) -> Any:
        kind = LocalSteps if inner else RemoteOptimizer
        given = {"url": service.url, "run": name, "algorithm": "sgd", "lr": 1.0, "aggregation": "async", **options}
        made.append(kind(model, *inner, **given))
        return made[-1]

    yield optimizer
    for each in made:
        each.close()


def step(model: nn.Module, wrapped: Any, number: int) -> None:
    wrapped.zero_grad()
    loss_of(model, number).backward()
    wrapped.step()


def test_a_wrapper_acts_on_the_one_optimizer(play: Stage, make: Make, run: Run) -> None:
    model = network()
    optimizer = make(model, algorithm="sgd_schedule_free")

    def scene(net: nn.Module, wrapped: Any) -> None:
        assert wrapped is not optimizer
        assert isinstance(wrapped, RemoteOptimizer)
        wrapped.loss = 0.5
        step(net, wrapped, 0)
        assert run.status().loss == 0.5
        assert optimizer.loss is None
        assert optimizer.receipt is not None
        assert optimizer.receipt is wrapped.receipt
        assert optimizer.loaded == wrapped.loaded
        wrapped.eval()
        assert optimizer.loaded.point == "x"
        assert torch.equal(held(model), pulled(run, "x"))
        for either in (wrapped, optimizer):
            with pytest.raises(EvalMode):
                step(net, either, 1)
        assert run.status().step == 1
        assert torch.equal(held(model), pulled(run, "x"))
        wrapped.train()
        assert optimizer.loaded.point == "y"
        step(net, wrapped, 1)
        optimizer.eval()
        with pytest.raises(EvalMode):
            step(net, wrapped, 2)
        optimizer.train()
        step(net, wrapped, 2)
        assert run.status().step == 3
        assert run.status().loss == 0.5

    play(model, optimizer, scene)


def test_a_push_in_flight_is_known_to_both(play: Stage, make: Make, run: Run) -> None:
    model = network()
    optimizer = make(model, algorithm="sgd_schedule_free")

    def scene(net: nn.Module, wrapped: Any) -> None:
        for number in range(2):
            optimizer.zero_grad()
            loss_of(net, number).backward()
            optimizer.step(overlap=True)
        wrapped.flush()
        assert optimizer.loaded.step == 2
        step(net, wrapped, 2)
        assert optimizer.loaded.step == 3
        assert torch.equal(held(model), pulled(run))

    play(model, optimizer, scene)


def test_a_wrappers_state_is_the_optimizers(play: Stage, make: Make, run: Run) -> None:
    model = network()
    optimizer = make(model, push_dtype="BF16")

    def scene(net: nn.Module, wrapped: Any) -> None:
        step(net, wrapped, 0)
        before = optimizer._membership.granted
        state = wrapped.state_dict()
        assert state["param_groups"] == optimizer.state_dict()["param_groups"]
        assert torch.equal(saved_residual(wrapped), saved_residual(optimizer))
        wrapped.load_state_dict(state)
        assert optimizer._membership.granted is before
        assert len(run.workers(before.lease)) == 1 and run.workers(before.lease)[0].lease == before.lease
        step(net, wrapped, 1)
        wrapped.load_state_dict(state)
        assert wrapped.loaded == optimizer.loaded
        assert optimizer.loaded.step == 2
        with pytest.raises(FreestepError, match="fixed"):
            wrapped.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        step(net, optimizer, 2)
        assert run.status().step == 3

    play(model, optimizer, scene)


def test_what_a_wrapper_closes_is_closed(play: Stage, make: Make, run: Run) -> None:
    model = network()
    optimizer = make(model)

    def scene(net: nn.Module, wrapped: Any) -> None:
        with wrapped:
            step(net, wrapped, 0)
        assert run.workers() == []
        for either in (wrapped, optimizer):
            with pytest.raises(Closed):
                step(net, either, 1)
        wrapped.close()
        assert run.status().step == 1

    play(model, optimizer, scene)


def test_a_wrapper_takes_local_steps(play: Stage, make: Make, run: Run) -> None:
    model = network()
    optimizer = make(model, torch.optim.AdamW(model.parameters(), lr=0.01), every=3)

    def scene(net: nn.Module, wrapped: Any) -> None:
        step(net, wrapped, 0)
        assert (wrapped.steps, optimizer.steps) == (1, 1)
        local = held(model)
        state = wrapped.state_dict()
        wrapped.eval()
        for either in (wrapped, optimizer):
            with pytest.raises(EvalMode):
                step(net, either, 1)
        assert optimizer.steps == 1
        wrapped.train()
        assert torch.equal(held(model), local)
        for number in (1, 2):
            wrapped.loss = float(number)
            step(net, wrapped, number)
        assert (optimizer.steps, run.status().step) == (0, 1)
        assert run.status().loss == 1.5
        assert torch.equal(held(model), pulled(run))
        wrapped.load_state_dict(state)
        assert (wrapped.steps, optimizer.steps) == (1, 1)
        wrapped.push()
        assert (optimizer.steps, run.status().step) == (0, 2)
        assert optimizer.receipt is wrapped.receipt

    play(model, optimizer, scene)


def test_a_wrapper_takes_closures(play: Stage, make: Make, run: Run) -> None:
    model = network()
    optimizer = make(model)

    def scene(net: nn.Module, wrapped: Any) -> None:
        def closure() -> float:
            wrapped.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            return loss.item()

        assert wrapped.step(closure) == run.status().loss
        assert run.status().step == 1

    play(model, optimizer, scene)


def test_a_closure_that_has_nothing_to_train_on_pushes_nothing(make: Make, run: Run) -> None:
    """As Lightning's is, where `training_step` returns None."""
    optimizer = make(network())
    before = pulled(run)
    assert optimizer.step(lambda: None) is None
    assert run.status().step == 0
    assert torch.equal(pulled(run), before)
