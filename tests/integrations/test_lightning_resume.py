"""Lightning's fits that end early or go on: resumed checkpoints, exceptions, and what a fit leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from freestep import LocalSteps, RemoteOptimizer, Run, StateMismatch
from freestep.integrations.lightning import FreestepCallback
from harness import ThreadService
from lightning_module import QUIET, WITH_ITS_WARNINGS, Make, Module, by_the_package, loader, trainer, weights
from trained import held, network, pulled

pytestmark = WITH_ITS_WARNINGS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def saved(make_module: Make, tmp_path: Path) -> Path:
    """A checkpoint after the first epoch of a fit, which has ended."""
    saver = ModelCheckpoint(tmp_path, "first")
    trainer(tmp_path, saver).fit(make_module(worker="saved"), loader(), loader())
    return tmp_path / "first.ckpt"


def resume(module: Module, saved: Path, *callbacks: Callback) -> None:
    # Lightning asks for the callbacks that the checkpoint was saved with.
    with_it = trainer(saved.parent, *callbacks, ModelCheckpoint(saved.parent), max_epochs=2)
    with_it.fit(module, loader(), loader(), ckpt_path=saved)


def test_a_resumed_fit_goes_on_at_the_runs_newest_y(
    make_module: Make, run: Run, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(seed=1)
    resume(module, saved)
    assert run.status().step == 16
    torch.testing.assert_close(held(module), held(by_the_package(2)[0]), **CLOSE)
    assert "goes on at step 8, whose y was loaded; the state was saved at step 8" in caplog.text
    assert "was changed outside" not in caplog.text


def test_where_the_run_is_gone_a_resumed_fit_is_refused(make_module: Make, run: Run, saved: Path) -> None:
    run.delete()
    with pytest.raises(StateMismatch, match="on_missing"):
        resume(make_module(), saved)
    assert run.status().step == 0
    assert run.workers() == []


@pytest.mark.parametrize("on_missing", ["seed", "join"])
def test_where_the_run_is_gone_a_new_one_starts_from_the_checkpoints_x(
    make_module: Make, run: Run, saved: Path, on_missing: str
) -> None:
    run.delete()
    begun: list[Tensor] = []

    class Begun(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            begun.append(held(pl_module))

    module = make_module(seed=1, on_missing=on_missing)
    resume(module, saved, Begun())
    assert torch.equal(begun[0], weights(saved))
    assert run.status().step == 8


class Failing(Module):
    """Its third batch raises what it is given."""

    error: BaseException = RuntimeError("out of luck")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if batch_idx == 2:
            raise self.error
        return super().training_step(batch, batch_idx)


class Interrupted(Failing):
    error = KeyboardInterrupt()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(("kind", "error"), [(Failing, RuntimeError), (Interrupted, SystemExit)])
def test_a_fit_that_fails_ends_its_lease_and_says_where_the_model_is(
    make_module: Make,
    run: Run,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: type[Module],
    error: type[BaseException],
) -> None:
    module = make_module(kind)
    saver = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(error):
        trainer(tmp_path, saver).fit(module, loader())
    assert run.workers() == []
    assert torch.equal(held(module), pulled(run))
    assert f"contains y of the run {run.name}, not x" in caplog.text
    (saved,) = tmp_path.glob("*.ckpt")
    assert torch.equal(weights(saved), pulled(run))
    again = make_module(seed=1)
    resume(again, saved)
    assert torch.equal(held(again), pulled(run, "x"))


def test_a_failing_test_is_none_of_its_business(
    make_module: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module()
    with_it = trainer(tmp_path)
    with_it.fit(module, loader())
    with pytest.raises(RuntimeError):
        with_it.test(module, [torch.ones(1, 2)], verbose=False)
    assert "fit has ended" not in caplog.text


def test_a_second_fit_trains_on(make_module: Make, run: Run, tmp_path: Path) -> None:
    module = make_module(worker="same")
    for _ in range(2):
        trainer(tmp_path).fit(module, loader())
    assert run.status().step == 16
    assert torch.equal(held(module), pulled(run, "x"))


def test_a_fit_without_a_remote_optimizer_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Ordinary(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    trainer(tmp_path).fit(module, loader(), loader())
    assert "FreestepCallback does nothing" in caplog.text


class Ordinary(Module):
    """Does not look at its optimizer."""

    def see(self, stage: str) -> None:
        pass


@pytest.mark.parametrize("validated", [True, False])
def test_local_steps(service: ThreadService, name: str, run: Run, tmp_path: Path, validated: bool) -> None:
    def optimizer(model: nn.Module) -> LocalSteps:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        return LocalSteps(model, inner, every=3, url=service.url, run=name, lr=1.0, momentum=0.0)

    module = Ordinary(optimizer)
    validation = [loader()] if validated else []
    trainer(tmp_path, val_check_interval=4 if validated else None).fit(module, loader(), *validation)
    assert run.status().step == 3
    expected = network()
    peer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for inputs in loader():
        peer.zero_grad()
        expected(inputs).square().mean().backward()
        peer.step()
    torch.testing.assert_close(held(module), held(expected), **CLOSE)
    assert torch.equal(held(module), pulled(run, "x"))


def test_int8_pulls_and_overlap(make_module: Make, run: Run, tmp_path: Path) -> None:
    """Validation waits for the push in flight."""

    class Overlapped(Ordinary):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step(overlap=True)

    module = make_module(Overlapped, pull_dtype="I8", push_encoding="int8")
    trainer(tmp_path, max_epochs=2, val_check_interval=3).fit(module, loader(), loader())
    assert run.status().step == 16
    torch.testing.assert_close(held(module), pulled(run, "x"), rtol=0, atol=0.01)


class OfTheOtherPackage(pytorch_lightning.LightningModule):
    """As `Module`."""

    def __init__(self, make: Callable[[nn.Module], RemoteOptimizer]) -> None:
        super().__init__()
        self.net = network()
        self._make = make

    def configure_optimizers(self) -> RemoteOptimizer:
        return self._make(self)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch).square().mean())


def test_pytorch_lightning(service: ThreadService, name: str, run: Run, tmp_path: Path) -> None:
    module = OfTheOtherPackage(lambda m: RemoteOptimizer(m, url=service.url, run=name, aggregation="async"))
    saver = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", monitor="val_loss")
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 2, "default_root_dir": tmp_path}
    pytorch_lightning.Trainer(callbacks=[FreestepCallback(), saver], **options).fit(module, loader(), loader())
    assert torch.equal(held(module), pulled(run, "x"))
    torch.testing.assert_close(held(module), held(by_the_package(2)[0]), **CLOSE)
    assert torch.equal(weights(saver.best_model_path), held(module))
