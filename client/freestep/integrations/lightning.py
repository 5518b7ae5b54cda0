"""Lightning: validation, checkpoints and the fitted model at x, while training goes on at y."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from freestep.batchnorm import BatchNormCaution
from freestep.errors import FreestepError
from freestep.local_steps import LocalSteps
from freestep.optimizer import RemoteOptimizer
from freestep.unit_loader import UnitLoader
from freestep.units import Units

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    from pytorch_lightning.utilities import CombinedLoader  # type: ignore[assignment]

__all__ = ["FreestepCallback"]

logger = logging.getLogger("freestep")


class FreestepCallback(Callback):
    """Has a Trainer validate and save x, the average, and train at y.

    For modules whose `configure_optimizers` makes a RemoteOptimizer, of any class, or several of them.

    - Validation in `fit` is at the newest x; y is loaded again before the next batch.
    - The `state_dict` of every checkpoint is x: after validation the x that was validated, so that the best checkpoint
      is the model that scored, else the newest. Resumed by `ckpt_path`, the optimizer loads the run's newest y.
    - At the end of `fit` the model contains x, and the optimizers are closed; an unfinished round of LocalSteps is
      pushed before. `validate`, `test` and `predict` then have that x, or the weights of their `ckpt_path`. If `fit`
      ends with an exception, the model stays where it is, which is said.
    - Where a module trains on a loader of `freestep.Units`, an epoch is a loop over what is left of the data, and `fit`
      ends when all units have counted, or after `max_epochs`: -1 for no other end. What an epoch leaves of a round of
      LocalSteps, or of an accumulation, is pushed at its end.
    - In automatic optimization a push reports the mean loss of the batches that its gradient was accumulated from. In
      manual optimization pass it to `step(loss=...)`.

    The statistics of BatchNorm layers are those at y: call `reestimate_batchnorm` in `on_validation_start` of the
    module, which is at x then, and after `fit`.

    Lightning calls no callback for checkpoints of weights only. Those of a ModelCheckpoint are x too; if you call
    `trainer.save_checkpoint(..., weights_only=True)` while training, call the optimizer's `eval` before. Finders of
    learning rates and batch sizes take steps that the run keeps.

    It fits `lightning.pytorch`, and `pytorch_lightning` too, whose Trainer needs it in a list.

    Example:
        >>> class Model(lightning.LightningModule):
        ...     def configure_optimizers(self):
        ...         return freestep.RemoteOptimizer(self, url="http://127.0.0.1:8000", run="mnist", lr=2.5e-3)
        >>> trainer = lightning.Trainer(callbacks=[FreestepCallback()])
        >>> trainer.fit(Model(), loader, validation_loader)
    """

    def __init__(self) -> None:
        self._optimizers: Sequence[RemoteOptimizer] = ()
        """Those of the current `fit`."""
        self._losses: list[Tensor] = []
        """Of the batches since gradients were set to zero."""
        self._batchnorm = BatchNormCaution()

    # From the beginning of `fit` to its end

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the optimizers. Raises FreestepError if a ModelCheckpoint would save y."""
        self._optimizers = [each for each in trainer.optimizers if isinstance(each, RemoteOptimizer)]
        if not self._optimizers:
            logger.warning("configure_optimizers has made no RemoteOptimizer: FreestepCallback does nothing")
        self._batchnorm.begin()
        for optimizer in self._optimizers:
            optimizer._progress.tells_begin = not _takes_batches_itself(pl_module)
        for each in trainer.checkpoint_callbacks:
            if _saves_weights_only(each) and getattr(each, "_train_time_interval", None) is not None:
                raise FreestepError(
                    "a ModelCheckpoint with save_weights_only=True and a train_time_interval would save y, since "
                    "Lightning calls no callback before: leave save_weights_only out, or save by steps or epochs"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises FreestepError if units would not be counted with the steps on them, or not all of them come."""
        if any(isinstance(each, Units) for each in CombinedLoader(trainer.train_dataloader).flattened):
            raise FreestepError(
                "Lightning takes units before it has trained on those before, of which Units are not told: give "
                "Lightning units.loader(dataset, batch_size=...)"
            )
        mode = trainer.fit_loop._combined_loader._mode  # type: ignore[union-attr]
        if len(_unit_loaders(trainer)) > 1 and mode != "max_size":
            raise FreestepError(
                f"loaders of units of several data sets end one after another, and the mode {mode!r} does not go on "
                'with those that are left: give Lightning CombinedLoader(loaders, "max_size")'
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pushes unfinished rounds, and loads x unless the model contains it."""
        self._push_rounds()
        self._load_x()
        if self._optimizers:
            self._batchnorm.before_use()

    def _push_rounds(self) -> None:
        for each in self._optimizers:
            if isinstance(each, LocalSteps) and each.steps:
                each.train()
                each.push()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the optimizers, with x in the model even if there was nothing to train."""
        with ExitStack() as stack:
            for each in self._optimizers:
                stack.callback(each.close)
            self._load_x()
            self._optimizers = ()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Releases the leases, and waits for nothing."""
        for each in self._optimizers:
            if each.loaded.point == "y":
                logger.warning(
                    "fit has ended with %s: the model contains y of the run %s, not x, and so do checkpoints that are "
                    "saved now; resumed by ckpt_path they are as good",
                    type(exception).__name__,
                    each.param_groups[0]["run"],
                )
            each.__exit__(type(exception), exception, exception.__traceback__)
        self._optimizers = ()

    # Points

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the newest x."""
        for each in self._optimizers:
            each.eval()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns of BatchNorm layers whose statistics were those of y."""
        if self._optimizers:
            self._batchnorm.before_use()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Loads y, if the model contains x; tells loaders of units, of which Lightning may have taken the next batch.

        Raises FreestepError if gradients would not be taken at y.
        """
        is_plain = pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1
        for each in self._optimizers:
            if each.loaded.point == "x":
                each.train()
            if each.loaded.point == "x" and not is_plain:
                raise FreestepError(
                    f"{type(each).__name__} loads y for the closures of its steps only, which Lightning passes in "
                    "automatic optimization without accumulation: use the class without Closure in its name"
                )
        if not _takes_batches_itself(pl_module):
            for loader in _unit_loaders(trainer):
                loader.begin_next()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts x in the place of y; the model goes on at y."""
        if at_y := self._load_x():
            saved = checkpoint["state_dict"]
            x = copy.deepcopy(trainer.strategy.lightning_module_state_dict())
            saved.update((name, value) for name, value in x.items() if name in saved)
            for each in at_y:
                each.train()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Loads x if weights only are about to be saved by the number of steps."""
        if any(_saves_weights_only_at(each, trainer.global_step) for each in trainer.checkpoint_callbacks):
            self._load_x()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads x if weights only may be about to be saved; ends with the last unit where units are handed out."""
        if loaders := _unit_loaders(trainer):
            self._push_rest(trainer, pl_module)
            self._push_rounds()
            trainer.should_stop |= all(each.is_exhausted() for each in loaders)
        if any(map(_saves_weights_only, trainer.checkpoint_callbacks)):
            self._load_x()

    def _push_rest(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Has no units left in gradients: if there is no more data, nobody would push or clear these.

        Lightning takes a step with less than it accumulates if it knows that a batch is the last.
        """
        if not pl_module.automatic_optimization:
            return
        for each in self._optimizers:
            if each._has_units:
                if self._losses and each._gradients.has_any():
                    each.train()
                    its: Any = pl_module.optimizers()
                    pl_module.optimizer_step(trainer.current_epoch, 0, its, self._mean_loss)
                # Of a step that a GradScaler has skipped, too.
                each.zero_grad()

    def _load_x(self) -> list[RemoteOptimizer]:
        """Loads x in the place of y; returns the optimizers whose it was."""
        at_y = [each for each in self._optimizers if each.loaded.point == "y"]
        for each in at_y:
            each.eval()
        return at_y

    # The loss, in automatic optimization

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Begins a gradient."""
        self._losses.clear()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps the batch's loss, which Lightning has divided for the accumulation, and multiplied for a GradScaler."""
        self._batchnorm.note_training(pl_module)
        if pl_module.automatic_optimization:
            scale = trainer.scaler.get_scale() if trainer.scaler is not None else 1.0
            self._losses.append(loss.detach() * (trainer.accumulate_grad_batches / scale))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Hands the losses' mean to the push."""
        if self._losses and isinstance(optimizer, RemoteOptimizer):
            optimizer.loss = self._mean_loss()
            self._losses.clear()

    def _mean_loss(self) -> Tensor:
        return torch.stack(self._losses).mean()


def _unit_loaders(trainer: Trainer) -> list[UnitLoader]:
    return [each for each in CombinedLoader(trainer.train_dataloader).flattened if isinstance(each, UnitLoader)]


def _takes_batches_itself(pl_module: LightningModule) -> bool:
    """Whether a module's step takes its batches from the loader, and not from Lightning."""
    return "dataloader_iter" in signature(pl_module.training_step).parameters


def _saves_weights_only(checkpoint: Any) -> bool:
    return bool(getattr(checkpoint, "save_weights_only", False))


def _saves_weights_only_at(checkpoint: Any, step: int) -> bool:
    """True if a ModelCheckpoint saves weights only after this step, and has not yet."""
    every = getattr(checkpoint, "_every_n_train_steps", 0)
    return (
        _saves_weights_only(checkpoint)
        and every > 0
        and step % every == 0
        and step != getattr(checkpoint, "_last_global_step_saved", None)
    )
