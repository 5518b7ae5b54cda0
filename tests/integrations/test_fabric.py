"""Fabric's loop: set up, clipped, saved at x and loaded, it trains as the schedulefree package does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn

from counting import LENGTH, Counts, Numbers, counted
from freestep import RemoteOptimizer, Run, StateMismatch, Units
from harness import ThreadService
from lightning_module import SMOOTHING, WITH_ITS_WARNINGS, by_the_package, loader
from trained import held, network, pulled

pytestmark = WITH_ITS_WARNINGS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SetUp = Callable[..., tuple[Fabric, nn.Module, Any]]


@pytest.fixture
def set_up(service: ThreadService, name: str) -> Iterator[SetUp]:
    """Makes a Fabric, a model and its optimizer, which Fabric has set up; it is closed with the test."""
    made: list[RemoteOptimizer] = []

    def setup(seed: int = 0, precision: Any = None, **options: Any) -> tuple[Fabric, nn.Module, Any]:
        fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
        model = network(seed)
        made.append(RemoteOptimizer(model, url=service.url, run=name, aggregation="async", **options))
        return fabric, *fabric.setup(model, made[-1])

    yield setup
    for each in made:
        each.close()


def train(fabric: Fabric, model: nn.Module, optimizer: Any, *, clip: float | None = None) -> None:
    """An epoch."""
    for inputs in fabric.setup_dataloaders(loader()):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        fabric.backward(loss)
        if clip is not None:
            fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.loss = loss.detach()
        optimizer.step()


@pytest.mark.parametrize("clip", [None, 0.05])
def test_it_trains_as_the_package_does(set_up: SetUp, run: Run, clip: float | None) -> None:
    fabric, model, optimizer = set_up()
    train(fabric, model, optimizer, clip=clip)
    optimizer.eval()
    expected, losses = by_the_package(clip=clip)
    torch.testing.assert_close(held(model), held(expected), **CLOSE)
    average = losses[0]
    for loss in losses[1:]:
        average += SMOOTHING * (loss - average)
    assert run.status().loss == pytest.approx(average, rel=1e-4)


def test_what_is_saved_at_x_is_loaded_and_training_goes_on(set_up: SetUp, run: Run, tmp_path: Path) -> None:
    fabric, model, optimizer = set_up(push_dtype="BF16")
    train(fabric, model, optimizer)
    optimizer.eval()
    fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    x = pulled(run, "x")
    optimizer.train()
    train(fabric, model, optimizer)
    optimizer.close()
    fabric, again, resumed = set_up(seed=1, push_dtype="BF16")
    saved = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert torch.equal(torch.cat([each.reshape(-1) for each in saved["model"].values()]), x)
    fabric.load(tmp_path / "state.ckpt", {"model": again, "optimizer": resumed})
    assert torch.equal(held(again), pulled(run))
    train(fabric, again, resumed)
    assert run.status().step == 24


def test_a_state_whose_run_is_gone_is_refused(set_up: SetUp, run: Run, tmp_path: Path) -> None:
    fabric, model, optimizer = set_up()
    train(fabric, model, optimizer)
    fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    optimizer.close()
    run.delete()
    fabric, again, resumed = set_up()
    with pytest.raises(StateMismatch):
        fabric.load(tmp_path / "state.ckpt", {"model": again, "optimizer": resumed})
    assert run.status().step == 0


def test_16_mixed_skips_what_overflows_and_unscales_the_rest(set_up: SetUp, run: Run) -> None:
    # Fabric has no 16-mixed of its own on CPUs. The first scale makes infinite gradients, the next does not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, backoff_factor=2.0**-18)
    fabric, model, optimizer = set_up(precision=MixedPrecision("16-mixed", "cpu", scaler))
    train(fabric, model, optimizer)
    assert (scaler.get_scale(), run.status().step) == (4.0, 7)
    optimizer.eval()
    torch.testing.assert_close(held(model), held(by_the_package(skip=1)[0]), rtol=0.05, atol=0.01)


def test_units_are_those_of_the_optimizer_that_was_set_up(service: ThreadService, name: str, run: Run) -> None:
    counts, fabric = Counts(), Fabric(accelerator="cpu", devices=1)
    with RemoteOptimizer(counts, url=service.url, run=name, algorithm="sgd", lr=1.0, aggregation="async") as remote:
        _, optimizer = fabric.setup(counts, remote)
        units = Units(optimizer, LENGTH, unit=5)
        for number, examples in enumerate(units.loader(Numbers(), batch_size=5)):
            optimizer.zero_grad()
            fabric.backward(-counts.count[examples].sum())
            if number != 3:
                # The others are given back by the next zero_grad, as where a scaler skips a step.
                optimizer.step()
        assert units.exhausted and counted(run) == {1.0}
