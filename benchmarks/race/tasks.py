"""What is trained: the demo's network on its digits, and the lab's transformer on characters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.lab.characters import Text, Transformer
from freestep.demo.data import load
from freestep.demo.model import SmallConvNet
from freestep.demo.worker import shifted

__all__ = ["TASKS", "Pair", "Task"]

Pair = tuple[Tensor, Tensor]
"""Inputs and targets of a batch; the first dimension of both is the batch's."""


class Task(Protocol):
    """says: what it is. device_s: seconds that a device takes for a gradient. targets: losses on what is held out."""

    says: str
    device_s: float
    targets: tuple[float, ...]

    def __init__(self, folder: Path) -> None:
        """folder: where data that takes long to read is kept between processes."""

    def model(self, seed: int) -> nn.Module:
        """With the initial weights of a seed."""

    def batches(self, seed: int, worker: int, step: int) -> Iterator[Pair]:
        """A worker's batches without end, always the same of a seed, a worker and the step that it begins at."""

    def loss(self, forward: Callable[[Tensor], Tensor], pair: Pair) -> Tensor:
        """The mean loss of a batch."""

    def worth(self, weights: Mapping[str, Tensor]) -> tuple[float, float]:
        """Mean loss and accuracy, from 0 to 1, on what is held out."""


class _Digits(Task):
    says = "the demo's network (52,138 parameters), 32 of 4,000 digits to a gradient; 1,000 digits are held out"
    device_s, targets = 0.03, (0.3, 0.12)
    _BATCH = 32

    def __init__(self, folder: Path) -> None:
        self._digits = load(folder / "digits.pt")

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return SmallConvNet()

    def batches(self, seed: int, worker: int, step: int) -> Iterator[Pair]:
        chance, digits = torch.Generator().manual_seed(_number(seed, worker, step)), self._digits
        while True:
            order = torch.randperm(len(digits.train_labels), generator=chance)
            for indices in torch.split(order, self._BATCH):
                yield shifted(digits.train_images[indices], chance), digits.train_labels[indices]

    def loss(self, forward: Callable[[Tensor], Tensor], pair: Pair) -> Tensor:
        return cross_entropy(forward(pair[0]), pair[1])

    @torch.no_grad()
    def worth(self, weights: Mapping[str, Tensor]) -> tuple[float, float]:
        model = SmallConvNet()
        model.load_state_dict(dict(weights))
        return _worth(model(self._digits.test_images), self._digits.test_labels)


class _Characters(Task):
    says = "a transformer (78,000 parameters) on Python's language reference, 16 windows of 32 characters to a gradient"
    device_s, targets = 0.03, (2.5, 2.2, 2.0)
    _BATCH, _LENGTH, _WIDTH, _LAYERS, _HELD_OUT = 16, 32, 64, 1, 256

    def __init__(self, folder: Path) -> None:
        self._text = Text(self._LENGTH)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(self._text.alphabet, self._LENGTH, self._WIDTH, self._LAYERS)

    def batches(self, seed: int, worker: int, step: int) -> Iterator[Pair]:
        for number in count(_number(seed, worker, step)):
            windows = self._text.batch(self._BATCH, number)
            yield windows[:, :-1], windows[:, 1:]

    def loss(self, forward: Callable[[Tensor], Tensor], pair: Pair) -> Tensor:
        return cross_entropy(forward(pair[0]).flatten(0, 1), pair[1].flatten())

    @torch.no_grad()
    def worth(self, weights: Mapping[str, Tensor]) -> tuple[float, float]:
        model = self.model(0)
        model.load_state_dict(dict(weights))
        windows = self._text.validation_windows(self._HELD_OUT)
        return _worth(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def _number(seed: int, worker: int, step: int) -> int:
    """Of 32 bits, since torch's generators take no more of a seed."""
    return random.Random(f"{seed}/{worker}/{step}").getrandbits(32)


def _worth(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    return float(cross_entropy(logits, targets)), float((logits.argmax(1) == targets).float().mean())


TASKS: dict[str, type[Task]] = {"digits": _Digits, "characters": _Characters}
