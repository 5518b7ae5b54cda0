"""A model whose weights count which examples moved them, and how often; what it is trained on, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from freestep import RemoteOptimizer, Run

__all__ = ["LENGTH", "Counts", "Make", "Numbers", "Stream", "counted", "train"]

LENGTH = 50
Make = Callable[..., RemoteOptimizer]


class Counts(nn.Module):
    """A parameter for each example, which each step that is taken on it makes larger by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(LENGTH))

    def backward(self, examples: Any) -> None:
        (-self.count[torch.as_tensor(list(examples))].sum()).backward()


class Numbers(Dataset[int]):
    """Example i is i."""

    def __init__(self, length: int = LENGTH) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """No items by index."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(LENGTH))


def train(model: Counts, optimizer: RemoteOptimizer, loop: Any, **options: Any) -> None:
    for examples in loop:
        optimizer.zero_grad()
        model.backward(examples)
        optimizer.step(**options)
    optimizer.flush()


def counted(run: Run) -> set[float]:
    return set(run.pull("y")[0]["count"].tolist())
