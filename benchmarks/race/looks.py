"""Looks at x, at the same moments for all methods; what it is worth is found out when the race is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Album", "looks", "moments", "x_of"]


def moments(seconds: float, look_s: float) -> list[float]:
    """Seconds after the start at which x is looked at; the last is the end."""
    return [look_s * number for number in range(1, round(seconds / look_s) + 1)]


class Album:
    """A rank's looks at the x that it holds, as files.

    A rank that is about to change x takes the looks whose moments have passed: it has been what it is now since the
    change before, so at those moments too. A look takes it a millisecond or two.
    """

    def __init__(self, folder: Path, began: float, moments: Sequence[float], since: float = 0.0) -> None:
        """since: looks of before that many seconds are others' to take."""
        self._folder = folder
        self._due = [(began + at, number) for number, at in enumerate(moments) if at >= since]

    def take(self, x: Callable[[], Mapping[str, Tensor]]) -> None:
        """x: copies of the weights, which are asked for once if any look is due."""
        now, taken = time.monotonic(), None
        while self._due and self._due[0][0] <= now:
            taken = dict(x()) if taken is None else taken
            _, number = self._due.pop(0)
            partial = self._folder / f"look-{number}.{id(self)}"
            torch.save(taken, partial)
            partial.replace(self._folder / f"look-{number}.pt")


def looks(folder: Path, moments: Sequence[float]) -> Iterator[Mapping[str, Tensor] | None]:
    """What was seen at each moment, or by the look before where nobody looked; None before the first."""
    seen: Mapping[str, Tensor] | None = None
    for number in range(len(moments)):
        file = folder / f"look-{number}.pt"
        seen = torch.load(file) if file.exists() else seen
        yield seen


@torch.no_grad()
def x_of(net: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The weights in the eval mode of the schedulefree package's optimizer, which is left as it was, to the bit."""
    y = [each.clone() for each in net.parameters()]
    optimizer.eval()
    x = {name: each.detach().clone() for name, each in net.named_parameters()}
    optimizer.train()
    for each, held in zip(net.parameters(), y, strict=True):
        each.copy_(held)
    return x
