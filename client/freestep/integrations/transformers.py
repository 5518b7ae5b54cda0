"""Hugging Face's Trainer: a RemoteOptimizer as its optimizer, and checkpoints and the trained model at x."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SchedulerType

from freestep.batchnorm import BatchNormCaution
from freestep.errors import FreestepError
from freestep.groups import hyperparameter_names
from freestep.local_steps import LocalSteps
from freestep.optimizer import RemoteOptimizer
from freestep.run_request import DEFAULT_ALGORITHM
from freestep.unit_loader import UnitLoader

__all__ = ["FreestepCallback", "remote_optimizer"]

logger = logging.getLogger("freestep")

_FROM_ARGUMENTS: dict[str, Callable[[TrainingArguments], Any]] = {
    "lr": lambda args: args.learning_rate,
    "weight_decay": lambda args: args.weight_decay,
    "betas": lambda args: (args.adam_beta1, args.adam_beta2),
    "eps": lambda args: args.adam_epsilon,
    "warmup_steps": lambda args: _warmup_steps(args),
}
"""The hyperparameters that Trainer's own Schedule-Free optimizers take from TrainingArguments."""

Factory = Callable[[], Callable[..., RemoteOptimizer]]


def remote_optimizer(
    args: TrainingArguments, *, algorithm: str = DEFAULT_ALGORITHM, **options: Any
) -> tuple[Factory, dict[str, Any]]:
    """What Trainer's `optimizer_cls_and_kwargs` takes: a RemoteOptimizer that is made of Trainer's model.

    Parameters have the model's names. They are in param groups as Trainer makes them: `decay`, and `no_decay` for
    biases and norms. The ranks of torchrun or `accelerate launch` are one worker, unless `process_group` is given.

    Example:
        >>> trainer = Trainer(
        ...     model,
        ...     args,
        ...     train_dataset=dataset,
        ...     optimizer_cls_and_kwargs=remote_optimizer(args, url="http://127.0.0.1:8000", run="gpt", lr=2.5e-3),
        ...     callbacks=[FreestepCallback()],
        ... )

    Args:
        args: Trainer's arguments. Those of the algorithm's hyperparameters that are not given are taken from there:
            learning_rate, weight_decay, adam_beta1 and adam_beta2, adam_epsilon, warmup_steps.
        algorithm: The algorithm that the run is created with.
        **options: Arguments of RemoteOptimizer: `run`, `url`, hyperparameters and others.

    Raises:
        InvalidSpec: The algorithm or a hyperparameter is not known.
        FreestepError: Parameters are divided between ranks (FSDP, DeepSpeed), or warmup_steps is a part of a training
            whose length is not known.
    """
    if args.fsdp or args.deepspeed:
        raise FreestepError(
            "FSDP and DeepSpeed divide parameters between ranks, and a run needs whole ones: leave fsdp and deepspeed "
            "out of TrainingArguments, and the ranks are wrapped in DistributedDataParallel"
        )
    known = hyperparameter_names(algorithm)
    taken = {name: of(args) for name, of in _FROM_ARGUMENTS.items() if name in known and name not in options}
    return lambda: _made_of_model, {"process_group": "auto", "algorithm": algorithm, **taken, **options}


def _warmup_steps(args: TrainingArguments) -> int:
    if 0 < args.warmup_steps < 1 and args.max_steps <= 0:
        raise FreestepError(
            f"warmup_steps={args.warmup_steps} is a part of the training, whose length is not known before it begins: "
            "give the number of steps"
        )
    return int(args.get_warmup_steps(args.max_steps))


def _made_of_model(model: nn.Module, **options: Any) -> RemoteOptimizer:
    # It uses nothing of the Trainer.
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    decay, no_decay = list[tuple[str, Tensor]](), list[tuple[str, Tensor]]()
    for name, tensor in model.named_parameters():
        (decay if name in decaying else no_decay).append((name, tensor))
    known = hyperparameter_names(options["algorithm"])
    without: dict[str, Any] = {name: 0.0 for name in ("weight_decay", "weight_decay_at_y") if name in known}
    if "base" in known:
        without["base"] = {"weight_decay": 0.0}
    groups = [{"name": "decay", "params": decay}, {"name": "no_decay", "params": no_decay, **without}]
    return RemoteOptimizer([group for group in groups if group["params"]], **options)


class FreestepCallback(TrainerCallback):
    """Has Trainer save x, the average, and train at y; for a RemoteOptimizer, however it was given to Trainer.

    - Checkpoints contain x: that which was evaluated, if an evaluation came before, so that the best checkpoint is the
      model that scored; else the newest.
    - After training the model contains x, or the best checkpoint's weights under `load_best_model_at_end`, and keeps
      them: `evaluate`, `predict` and `save_model` have that model, until `train` is called again.
    - The schedule is constant, since the run has its own. The learning rate that is logged is the one that the run has
      used.
    - Where Trainer's `get_train_dataloader` gives a loader of `freestep.Units`, an epoch is a loop over what is left of
      the data: training goes on until all units have counted, or for `max_steps`. Gradients that an epoch leaves, since
      there was no more data for a whole accumulation, are pushed at its end.
    - A push reports the loss that the model returns, summed over a step's batches as Trainer does.
      `adamc_schedule_free_plus` needs it. A `compute_loss_func` of Trainer's has to be passed through `reporting`.

    The statistics of BatchNorm layers are those at y: call `reestimate_batchnorm` in Trainer's `evaluate`, behind
    `self.optimizer.eval()`, and after the training.

    A callback that sets `should_save` has to stand before this one. JIT checkpoints, which Trainer writes at a SIGTERM,
    contain y, and so does the model after a training that an exception or a Ctrl-C has ended: Trainer calls no callback
    then, so call `trainer.optimizer.eval()` before `save_model`. Weights that are saved while they are y are warned of.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[Tensor, bool]] = []
        """Of the batches of the current step, and whether each is a part of the step's mean already."""
        self._hooks: list[RemovableHandle] = []
        """On the model, from the beginning of a training to its end: they note losses, and look at what is saved."""
        self._remote: RemoteOptimizer | None = None
        """Whose y the model may contain, until that was warned of."""
        self._batchnorm = BatchNormCaution()

    def __getstate__(self) -> dict[str, Any]:
        # The hooks go with a copy of the model, which contains what it was copied with.
        return {**vars(self), "_remote": None}

    # From the beginning of the training to its end

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Makes the schedule constant, and says so unless it was the default one."""
        asked = SchedulerType(args.lr_scheduler_type)
        if asked not in (SchedulerType.CONSTANT, SchedulerType.LINEAR):
            logger.warning(
                "lr_scheduler_type=%r has no effect: the run's hyperparameters have its warmup and schedule, and "
                "`freestep set` changes them while it trains",
                asked.value,
            )
        args.lr_scheduler_type = SchedulerType.CONSTANT

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises FreestepError if Trainer has another optimizer."""
        self._remote, model = _remote(kwargs["optimizer"]), kwargs["model"]
        if isinstance(kwargs["train_dataloader"], UnitLoader):
            # A training that is resumed is handed no batch that has counted.
            args.ignore_data_skip = True
        if getattr(args, "enable_jit_checkpoint", False):
            logger.warning("JIT checkpoints contain y: no callback is called before; other checkpoints contain x")
        self._unhook()
        self._batchnorm.begin()
        self._hooks = [
            model.register_forward_hook(self._note_loss, with_kwargs=True),
            model.register_state_dict_pre_hook(self._warn_of_y),
        ]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Loads x, unless Trainer has loaded the best model, and has the model keep it."""
        remote = _remote(kwargs["optimizer"])
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            remote.eval()
        remote.keep_weights()
        self._batchnorm.before_use()
        self._unhook()

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    # Points

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Loads x if a checkpoint is about to be saved; Trainer loads y before the next batch."""
        if control.should_save and not control.should_evaluate:
            _remote(kwargs["optimizer"]).eval()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As `on_step_end`; where units of data are handed out, pushes what is left, and ends with the last of them."""
        if isinstance(loader := kwargs["train_dataloader"], UnitLoader):
            if control.should_epoch_stop or control.should_training_stop:
                # Some of a step's batches have no gradient: all of them are given back.
                _remote(kwargs["optimizer"]).zero_grad()
            else:
                self._push_rest(args, state, control, **kwargs)
            control.should_training_stop |= loader.is_exhausted()
        self.on_step_end(args, state, control, **kwargs)

    def _push_rest(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes a step with gradients of fewer batches than are accumulated, as Trainer does with the others."""
        remote, scaler = _remote(kwargs["optimizer"]), getattr(kwargs["optimizer"], "scaler", None)
        if remote._has_units and remote._gradients.has_any():
            if scaler is not None:
                scaler.unscale_(remote)
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(kwargs["model"].parameters(), args.max_grad_norm)
            self.on_pre_optimizer_step(args, state, control, **kwargs)
            if scaler is None:
                remote.step()
            else:
                scaler.step(remote)
                scaler.update()
            remote.zero_grad()
        if remote._has_units and isinstance(remote, LocalSteps):
            remote.train()
            remote.push()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """While training, keeps the x that was evaluated for other data sets and for the checkpoint."""
        if self._hooks:
            _remote(kwargs["optimizer"]).keep_weights()
            self._batchnorm.before_use()

    def _warn_of_y(self, *_: Any) -> None:
        """Warns, once in a training, of weights that are taken to be saved while they are y."""
        if self._remote is not None and self._remote.loaded.point == "y":
            logger.warning(
                "the model's weights were taken while they are y of step %d, not x: after a training that was broken "
                "off, call trainer.optimizer.eval() before save_model; a callback that sets should_save has to stand "
                "before FreestepCallback",
                self._remote.loaded.step,
            )
            self._remote = None

    # What a step reports

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the losses of a step that was not completed."""
        self._losses.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hands the loss to the push. Raises FreestepError if it is not known and the algorithm needs it."""
        remote = _remote(kwargs["optimizer"])
        parts = [float(loss) / (1 if is_part else len(self._losses)) for loss, is_part in self._losses]
        if not parts and remote.spec.optimizer.needs_loss:
            raise FreestepError(
                f"{remote.spec.optimizer.algorithm} needs the loss, and the model returns none, since Trainer computes "
                "it: give Trainer compute_loss_func=callback.reporting(your function), without label smoothing"
            )
        remote.loss = sum(parts) if parts else None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the learning rates that the run has used to Trainer, which then asks its schedule for them."""
        remote = _remote(kwargs["optimizer"])
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            # Trainer clears the model's gradients, of which the optimizer is not told.
            remote._give_back_used(remote._gradients.versions())
        rates = [group["scheduled_lr"] for group in remote.param_groups]
        if isinstance(schedule := kwargs["lr_scheduler"], torch.optim.lr_scheduler.LRScheduler):
            schedule._last_lr = rates

    def reporting(self, compute_loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A `compute_loss_func` for Trainer whose losses are reported.

        Args:
            compute_loss_func: As for Trainer: a function of outputs, labels and num_items_in_batch. The losses of a
                step's batches add up to the step's.
        """

        def compute(*args: Any, **kwargs: Any) -> Tensor:
            loss = compute_loss_func(*args, **kwargs)
            if self._hooks and torch.is_grad_enabled():
                self._losses.append((loss.detach(), True))
            return loss

        return compute

    def _note_loss(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        self._batchnorm.note_training(model)
        loss = output.get("loss") if isinstance(output, Mapping) else output[0]
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Not a copy: Trainer still multiplies it, by the number of processes.
            self._losses.append((loss.detach(), kwargs.get("num_items_in_batch") is not None))


def _remote(optimizer: Any) -> RemoteOptimizer:
    """The RemoteOptimizer in what accelerate has wrapped around it. Raises FreestepError if there is none."""
    inner = optimizer
    while inner is not None and not isinstance(inner, RemoteOptimizer):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise FreestepError(
            f"Trainer's optimizer is {type(optimizer).__name__}, and FreestepCallback needs a RemoteOptimizer: give "
            "Trainer optimizer_cls_and_kwargs=remote_optimizer(args, ...)"
        )
    return inner
