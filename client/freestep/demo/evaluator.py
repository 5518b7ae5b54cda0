"""An evaluator: `python -m freestep.demo.evaluator` pulls x and y during training, and reports the accuracy."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from freestep.client import Client
from freestep.demo.data import Digits, load
from freestep.demo.model import SmallConvNet
from freestep.demo.options import NOT_NOW, await_run, end_on_signals, parser
from freestep.errors import EpochChanged, IdempotencyConflict
from freestep.run import Run

__all__ = ["Evaluation", "Worth", "evaluate", "main", "worth"]

_PATIENCE_S = 5.0
_TRAINED_ON = 1000
"""So many of the images that are trained on are evaluated, as they are: workers shift them."""


class Worth(NamedTuple):
    """What a model is worth: accuracy and loss on the test images, and loss on images that are trained on."""

    accuracy: float
    loss: float
    training_loss: float


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    time: seconds since 1970. workers: pushes by worker. x_accuracy, y_accuracy: on the test images, from 0 to 1.
    x_loss, y_loss: mean cross entropy on the test images. x_training_loss, y_training_loss: the same on images that
    are trained on. train_loss, staleness: the service's moving averages.
    """

    time: float
    epoch: int
    step: int
    workers: dict[str, int]
    staleness: float | None
    train_loss: float | None
    x_step: int
    x_accuracy: float
    x_loss: float
    x_training_loss: float
    y_step: int
    y_accuracy: float
    y_loss: float
    y_training_loss: float

    def __str__(self) -> str:
        loss = "-" if self.train_loss is None else f"{self.train_loss:.3f}"
        return (
            f"step {self.step:5}  workers {len(self.workers)}  train loss {loss}  "
            f"test accuracy x {self.x_accuracy:.1%}  y {self.y_accuracy:.1%}"
        )


def evaluate(run: Run, model: SmallConvNet, digits: Digits) -> Evaluation:
    """Pulls x and y, and evaluates the model with each."""
    status = run.status()
    (x, x_step), (y, y_step) = run.pull("x"), run.pull("y")
    of_x, of_y = worth(model, x, digits), worth(model, y, digits)
    return Evaluation(
        time=time.time(),
        epoch=status.epoch,
        step=status.step,
        workers={worker.worker: worker.pushes for worker in status.workers},
        staleness=status.staleness,
        train_loss=status.loss,
        x_step=x_step,
        x_accuracy=of_x.accuracy,
        x_loss=of_x.loss,
        x_training_loss=of_x.training_loss,
        y_step=y_step,
        y_accuracy=of_y.accuracy,
        y_loss=of_y.loss,
        y_training_loss=of_y.training_loss,
    )


@torch.no_grad()
def worth(model: SmallConvNet, parameters: Mapping[str, Tensor], digits: Digits) -> Worth:
    """What the model is worth with these parameters."""
    logits = functional_call(model, dict(parameters), (digits.test_images,))
    accuracy = (logits.argmax(1) == digits.test_labels).float().mean()
    trained_on = functional_call(model, dict(parameters), (digits.train_images[:_TRAINED_ON],))
    training_loss = cross_entropy(trained_on, digits.train_labels[:_TRAINED_ON])
    return Worth(float(accuracy), float(cross_entropy(logits, digits.test_labels)), float(training_loss))


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--every", type=float, default=1.0, help="seconds between evaluations")
    options.add_argument("--json", action="store_true", help="print a line of JSON for each, for programs")
    options.add_argument("--output", type=Path, help="a file that the lines of JSON are appended to")
    options.add_argument("--target", type=float, help="exit once x has this test accuracy")
    chosen = options.parse_args()
    end_on_signals()
    torch.set_num_threads(1)
    digits, model = load(chosen.data), SmallConvNet()
    with (
        Client(chosen.url, retry_for=_PATIENCE_S) as client,
        chosen.output.open("a", buffering=1) if chosen.output else nullcontext() as file,
    ):
        await_run(client, chosen.run)
        run = client.run(chosen.run)
        while True:
            try:
                evaluation = evaluate(run, model, digits)
                # The run was restored meanwhile, or another evaluator has reported this step with other rounding.
                with suppress(EpochChanged, IdempotencyConflict):
                    run.report("accuracy", evaluation.x_accuracy, evaluation.x_step, epoch=evaluation.epoch)
            except NOT_NOW:
                await_run(client, chosen.run)
                continue
            line = json.dumps(asdict(evaluation))
            if file is not None:
                file.write(line + "\n")
            sys.stdout.write((line if chosen.json else str(evaluation)) + "\n")
            sys.stdout.flush()
            if chosen.target is not None and evaluation.x_accuracy >= chosen.target:
                return
            time.sleep(chosen.every)


if __name__ == "__main__":
    main()
