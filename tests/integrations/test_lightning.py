"""Lightning's Trainer with the callback: it trains as the schedulefree package does, at y, and shows and saves x."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

import freestep
from freestep import Client, FreestepError, RemoteOptimizer, Run
from harness import ThreadService
from lightning_module import (
    SMOOTHING,
    WITH_ITS_WARNINGS,
    Make,
    Module,
    batches,
    by_the_package,
    loader,
    trainer,
    weights,
)
from trained import held, network, pulled

pytestmark = WITH_ITS_WARNINGS

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Losses(Callback):
    """The losses that the run has heard of, step by step, out of its moving average."""

    def __init__(self, run: Run) -> None:
        self.seen: list[float] = []
        self._run = run
        self._average: float | None = None
        self._step = 0

    def on_train_batch_end(self, *_: Any) -> None:
        status = self._run.status()
        if status.step > self._step:
            assert status.loss is not None
            before = status.loss if self._average is None else self._average
            self.seen.append(before + (status.loss - before) / SMOOTHING)
            self._average, self._step = status.loss, status.step


# Training


@pytest.mark.parametrize(
    ("options", "peer"),
    [
        ({"max_epochs": 2}, {"epochs": 2}),
        ({"accumulate_grad_batches": 4, "max_epochs": 2}, {"epochs": 2, "together": 4}),
        ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
        ({"accumulate_grad_batches": 3}, {"together": 3}),
    ],
    ids=["every batch", "accumulated", "clipped", "an unfinished accumulation"],
)
def test_it_trains_as_the_package_does(
    make_module: Make, run: Run, tmp_path: Path, options: dict[str, Any], peer: dict[str, Any]
) -> None:
    losses = Losses(run)
    module = make_module()
    trainer(tmp_path, losses, **options).fit(module, loader(), loader())
    expected, means = by_the_package(**peer)
    torch.testing.assert_close(held(module), held(expected), **CLOSE)
    assert losses.seen == pytest.approx(means, rel=1e-4)
    assert set(module.stages["train"]) == {"y"}
    assert set(module.stages["validate"]) == {"x"}
    assert run.status().step == len(means)


class Manual(Module):
    """Takes the steps itself."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.see("train")
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step(loss=loss.detach(), samples=len(batch))


def test_manual_optimization_trains_as_the_package_does(make_module: Make, run: Run, tmp_path: Path) -> None:
    losses = Losses(run)
    module = make_module(Manual)
    trainer(tmp_path, losses, max_epochs=2).fit(module, loader(), loader())
    expected, means = by_the_package(2)
    torch.testing.assert_close(held(module), held(expected), **CLOSE)
    assert losses.seen == pytest.approx(means, rel=1e-4)
    assert (set(module.stages["train"]), set(module.stages["validate"])) == ({"y"}, {"x"})


@pytest.mark.parametrize("kind", [freestep.AdamWScheduleFree, freestep.AdamWScheduleFreeClosure])
def test_drop_in_classes_train_as_the_packages(
    service: ThreadService, name: str, run: Run, tmp_path: Path, kind: type[RemoteOptimizer]
) -> None:
    module = Module(lambda model: kind(model, url=service.url, run=name))
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    trainer(tmp_path, saver, max_epochs=2, gradient_clip_val=0.05).fit(module, loader(), loader())
    torch.testing.assert_close(held(module), held(by_the_package(2, clip=0.05)[0]), **CLOSE)
    assert torch.equal(held(module), pulled(run, "x"))
    assert torch.equal(weights(tmp_path / "step=16.ckpt"), held(module))


@pytest.mark.parametrize(("kind", "options"), [(Module, {"accumulate_grad_batches": 2}), (Manual, {})])
def test_closure_forms_whose_gradients_would_be_taken_at_x_are_refused(
    service: ThreadService, name: str, run: Run, tmp_path: Path, kind: type[Module], options: dict[str, Any]
) -> None:
    module = kind(lambda model: freestep.AdamWScheduleFreeClosure(model, url=service.url, run=name), 0)
    with pytest.raises(FreestepError, match="without Closure"):
        trainer(tmp_path, **options).fit(module, loader())
    assert run.status().step == 0


class Evaluating(Manual):
    """Takes a step at x, by the wrapper that Lightning gives."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.eval()
        super().training_step(batch, batch_idx)


def test_a_step_at_x_ends_the_fit_and_is_not_applied(
    make_module: Make, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FreestepError, match="train"):
        trainer(tmp_path).fit(make_module(Evaluating), loader())
    assert run.status().step == 0
    assert run.workers() == []
    assert "contains y" not in caplog.text


class Stuttering(Module):
    """Has nothing to train on in every second batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_is_skipped_pushes_nothing(make_module: Make, run: Run, tmp_path: Path) -> None:
    trainer(tmp_path).fit(make_module(Stuttering), loader())
    assert run.status().step == 4


def test_bf16_mixed(make_module: Make, run: Run, tmp_path: Path) -> None:
    losses = Losses(run)
    module = make_module()
    trainer(tmp_path, losses, precision="bf16-mixed", max_epochs=2).fit(module, loader(), loader())
    expected, means = by_the_package(2)
    torch.testing.assert_close(held(module), held(expected), rtol=0.05, atol=0.01)
    assert losses.seen == pytest.approx(means, rel=0.05)


def test_16_mixed_skips_what_overflows_and_unscales_the_rest(make_module: Make, run: Run, tmp_path: Path) -> None:
    losses = Losses(run)
    # Lightning has no 16-mixed of its own on CPUs. The first scale makes infinite gradients, the next does not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, backoff_factor=2.0**-18)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    module = make_module()
    trainer(tmp_path, losses, plugins=precision, max_epochs=2, gradient_clip_val=1e3).fit(module, loader(), loader())
    assert scaler.get_scale() == 4.0
    assert run.status().step == 15
    peer, means = by_the_package(2, skip=1)
    assert losses.seen == pytest.approx(means, rel=0.05)
    torch.testing.assert_close(held(module), held(peer), rtol=0.05, atol=0.01)


class Pair(LightningModule):
    """Two optimizers, as a GAN has."""

    def __init__(self, make: Callable[[nn.Module, str], RemoteOptimizer]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleList([network(0), network(1)])
        self._make = make

    def configure_optimizers(self) -> list[RemoteOptimizer]:  # type: ignore[override]
        return [self._make(net, f"-{number}") for number, net in enumerate(self.nets)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):  # type: ignore[arg-type]
            with optimizer.toggle_model():
                optimizer.zero_grad()
                self.manual_backward(net(batch).square().mean())
                optimizer.step()


def test_several_optimizers(service: ThreadService, name: str, tmp_path: Path) -> None:
    module = Pair(lambda net, end: RemoteOptimizer(net, url=service.url, run=name + end, aggregation="async"))
    trainer(tmp_path).fit(module, loader())
    torch.testing.assert_close(held(module.nets[0]), held(by_the_package()[0]), **CLOSE)
    with Client(service.url) as client:
        for number, net in enumerate(module.nets):
            run = client.run(f"{name}-{number}")
            assert run.status().step == 8
            assert torch.equal(held(net), pulled(run, "x"))


class Normalizing(Module):
    """Has BatchNorm, and perhaps estimates its statistics, or does not train it."""

    estimates = is_frozen = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.net = nn.Sequential(nn.BatchNorm1d(6), self.net)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.net(inputs)
        return result

    def on_train_batch_start(self, *_: Any) -> None:
        self.net[0].train(not self.is_frozen)  # type: ignore[index]

    def on_validation_start(self) -> None:
        if self.estimates and not self.trainer.sanity_checking:
            freestep.reestimate_batchnorm(self, loader())


class Estimating(Normalizing):
    estimates = True


class Frozen(Normalizing):
    is_frozen = True


@pytest.mark.parametrize(("kind", "warned"), [(Normalizing, 1), (Estimating, 0), (Frozen, 0)])
@pytest.mark.parametrize("validated", [True, False])
def test_statistics_of_batchnorm_that_nobody_has_estimated_are_warned_about_once(
    make_module: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: type[Module],
    warned: int,
    validated: bool,
) -> None:
    trainer(tmp_path, max_epochs=2).fit(make_module(kind), loader(), *([loader()] if validated else []))
    expected = warned if validated or kind is Frozen else 1
    assert caplog.text.count("reestimate_batchnorm(model, batches)") == expected


# Points


def test_after_fit_the_model_contains_x_and_is_tested_there(make_module: Make, run: Run, tmp_path: Path) -> None:
    module = make_module()
    with_it = trainer(tmp_path, max_epochs=2)
    with_it.fit(module, loader())
    x = pulled(run, "x")
    assert torch.equal(held(module), x)
    assert not torch.equal(x, pulled(run, "y"))
    assert run.workers() == []
    (tested,) = with_it.test(module, loader(64), verbose=False)
    (validated,) = with_it.validate(module, loader(64), verbose=False)
    (predicted,) = with_it.predict(module, loader(64))
    at_x = network()
    nn.utils.vector_to_parameters(x, at_x.parameters())
    assert torch.equal(predicted, at_x(next(iter(batches(64)))))
    assert tested["test_loss"] == validated["val_loss"] == pytest.approx(float(predicted.square().mean()))
    with_it.save_checkpoint(tmp_path / "after.ckpt")
    with_it.save_checkpoint(tmp_path / "alone.ckpt", weights_only=True)
    assert torch.equal(weights(tmp_path / "after.ckpt"), x)
    assert torch.equal(weights(tmp_path / "alone.ckpt"), x)


def test_a_fit_without_a_batch_leaves_x_too(make_module: Make, run: Run, tmp_path: Path) -> None:
    trainer(tmp_path).fit(make_module(), loader())
    module = make_module(seed=1)
    trainer(tmp_path, limit_train_batches=0).fit(module, loader())
    assert torch.equal(held(module), pulled(run, "x"))
    assert run.workers() == []


class Points(Callback):
    """The model's point after each save, and the newest x at that moment."""

    def __init__(self, module: Module, run: Run) -> None:
        self.seen: list[tuple[str, Tensor]] = []
        self._module = module
        self._run = run

    def on_save_checkpoint(self, *_: Any) -> None:
        optimizer: Any = self._module.optimizers()
        assert torch.equal(held(self._module), pulled(self._run, optimizer.loaded.point))
        self.seen.append((optimizer.loaded.point, pulled(self._run, "x")))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_checkpoints_between_batches_are_x_while_the_model_stays_at_y(
    make_module: Make, run: Run, tmp_path: Path, accumulate: int
) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    module = make_module()
    points = Points(module, run)
    trainer(tmp_path, points, saver, accumulate_grad_batches=accumulate).fit(module, loader())
    expected = by_the_package(together=accumulate)[0]
    torch.testing.assert_close(held(module), held(expected), **CLOSE)
    assert [point for point, _ in points.seen] == ["y"] * (4 // accumulate)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert all(torch.equal(weights(path), x) for path, (_, x) in zip(saved, points.seen, strict=True))


@pytest.mark.parametrize(
    "trigger", [{"every_n_train_steps": 4}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}], ids=str
)
def test_weights_alone_are_x(make_module: Make, run: Run, tmp_path: Path, trigger: dict[str, Any]) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_weights_only=True, save_top_k=-1, **trigger)
    module = make_module()
    validation = [] if trigger else [loader()]
    trainer(tmp_path, saver, max_epochs=2).fit(module, loader(), *validation)
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert [path.stem for path in saved] == [
        f"step={step}" for step in ((4, 8, 12, 16) if "every_n_train_steps" in trigger else (8, 16))
    ]
    for epochs, path in ((1, saved[len(saved) // 2 - 1]), (2, saved[-1])):
        torch.testing.assert_close(weights(path), held(by_the_package(epochs)[0]), **CLOSE)


class Noting(RemoteOptimizer):
    """Notes in `evals` the step, each time that x is loaded."""

    evals: ClassVar[list[int]] = []

    def eval(self) -> None:
        self.evals.append(self.loaded.step)
        super().eval()


def test_x_is_loaded_once_for_each_use(
    service: ThreadService, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noting, "evals", [])
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, save_top_k=-1, every_n_train_steps=1)
    module = Module(lambda model: Noting(model, url=service.url, run=name))
    options = {"accumulate_grad_batches": 4, "num_sanity_val_steps": 0}
    trainer(tmp_path, saver, **options).fit(module, loader(), loader())
    # For the weights after each of two steps, and for the validation.
    assert Noting.evals == [1, 2, 2]


def test_weights_alone_by_time_are_refused(make_module: Make, run: Run, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, train_time_interval=timedelta(seconds=1))
    with pytest.raises(FreestepError, match="train_time_interval"):
        trainer(tmp_path, saver).fit(make_module(), loader())
    assert run.status().step == 0


class Busy(Callback):
    """Another worker, which steps whenever a validation ends: the newest x is no longer the one that was validated."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_validation_end(self, *_: Any) -> None:
        tensors, step = self._run.pull("x")
        with self._run.lease("other") as lease:
            receipt = self._run.push({key: torch.ones_like(each) for key, each in tensors.items()}, lease.claim(step))
        assert receipt.decision == "applied"


def test_the_best_checkpoint_is_the_model_that_scored(make_module: Make, run: Run, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", monitor="val_loss", save_top_k=-1, save_last=True)
    module = make_module()
    with_it = trainer(tmp_path, Busy(run), saver, max_epochs=3, num_sanity_val_steps=0)
    with_it.fit(module, loader(), loader(64))
    assert run.status().step == 27
    assert len(saver.best_k_models) == 3
    for path, score in saver.best_k_models.items():
        scored = network()
        nn.utils.vector_to_parameters(weights(path), scored.parameters())
        assert scored(next(iter(batches(64)))).square().mean().item() == pytest.approx(float(score))
    assert torch.equal(weights(saver.last_model_path), held(module))
    (best,) = with_it.validate(module, loader(64), ckpt_path="best", verbose=False)
    assert best["val_loss"] == pytest.approx(float(saver.best_model_score))
    assert torch.equal(held(module), weights(saver.best_model_path))
    with_it.test(module, loader(64), ckpt_path="best", verbose=False)
    assert torch.equal(held(module), weights(saver.best_model_path))
