"""What a Trainer has trained, logged and saved, and what a run has of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from freestep import FreestepError, RemoteOptimizer, Run

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
"""Of what is computed in another order, over several steps."""
Arguments = Callable[..., TrainingArguments]
Train = Callable[..., Trainer]


def optimizer_of(trainer: Trainer) -> RemoteOptimizer:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if not isinstance(optimizer, RemoteOptimizer):
        raise FreestepError("it was not made")
    return optimizer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def x_of(run: Run) -> dict[str, Tensor]:
    return dict(run.pull("x")[0])


def saved(folder: str | Path) -> dict[str, Tensor]:
    return weights(GPT2LMHeadModel.from_pretrained(folder))


def logged(trainer: Trainer, name: str) -> list[Any]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What freestep has warned of."""
    return [record.getMessage() for record in caplog.records if record.name == "freestep"]


class Each(TrainerCallback):
    """Does something at an event."""

    def __init__(self, event: str, work: Callable[..., Any]) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: work(state, control, **kwargs))


def stop_at(step: int) -> TrainerCallback:
    def stop(state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == step

    return Each("on_step_end", stop)
