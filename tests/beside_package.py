"""The `schedulefree` package's optimizers beside the drop-in ones: what both train, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freestep import Flat, RemoteOptimizer

SHAPES = {"matrix": (7, 5), "scalar": (), "cube": (3, 5, 7), "vector": (13,)}
BOUNDS = {"rtol": 1e-5, "atol": 1e-6}
STEPS = 60


class Home:
    """Where the runs of optimizers are: in the process, or on a service."""

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.made: list[RemoteOptimizer] = []
        self._name = name

    def __call__(self, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Makes an optimizer with a run of its own."""
        self.made.append(make(*arguments, url=self.url, run=f"{self._name}-{len(self.made)}", **options))
        return self.made[-1]

    def close(self) -> None:
        # Not left to the garbage collector, which may be in the service's thread.
        for each in self.made:
            each.close()


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_gradients(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> None:
    """Copies, since the package changes them."""
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()


def point(optimizer: RemoteOptimizer, point: str) -> list[Tensor]:
    """A point of the run, in the order of the parameters."""
    flat = Flat(optimizer._receive_buffer.manifest)
    optimizer._run.pull_into(flat, point)  # type: ignore[arg-type]
    return list(flat.views.values())


def assert_same(ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]) -> None:
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, **BOUNDS)


def assert_same_z(optimizer: RemoteOptimizer, theirs: dict[str, nn.Parameter], other: Any) -> None:
    for mine, parameter in zip(point(optimizer, "z"), theirs.values(), strict=True):
        torch.testing.assert_close(mine, other.state[parameter]["z"], **BOUNDS)


def assert_same_groups(ours: RemoteOptimizer, theirs: Any) -> None:
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert mine["k"] == other["k"]
        assert mine["lr_max"] == pytest.approx(other["lr_max"], rel=1e-12)
        assert mine["weight_sum"] == pytest.approx(other["weight_sum"], rel=1e-12)
        # The package's wrapper has none of these.
        assert mine["scheduled_lr"] == pytest.approx(other.get("scheduled_lr", mine["scheduled_lr"]), rel=1e-12)
        assert mine["train_mode"] == other.get("train_mode", mine["train_mode"])
