"""What tests train with optimizers of their own, and how the parameters of a model are read and set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from freestep import Run

WHOLE = {"algorithm": "diloco", "lr": 1.0, "momentum": 0.0}
"""An outer optimizer that takes a round's progress as it is."""
ADAMW = {"lr": 0.01, "weight_decay": 0.1}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
"""Of what is computed in another order."""


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(model: nn.Module, number: int) -> Tensor:
    loss: Tensor = model(torch.randn(8, 6, generator=torch.Generator().manual_seed(number))).square().mean()
    return loss


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, **options: Any) -> None:
    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step(**options)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Two models have the same parameters, as near as sums in another order are."""
    for (name, mine), (_, theirs) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def batches(count: int) -> Iterator[Tensor]:
    """The same for all."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 6, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 40) -> None:
    """Takes a step on each batch."""
    for inputs in batches(count):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def held(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def hold(model: nn.Module, vector: Tensor) -> None:
    """In place, so that optimizers keep their state."""
    with torch.no_grad():
        for parameter, part in zip(
            model.parameters(), vector.split([each.numel() for each in model.parameters()]), strict=True
        ):
            parameter.copy_(part.view_as(parameter))


def pulled(run: Run, point: str = "y") -> Tensor:
    tensors, _ = run.pull(point)  # type: ignore[arg-type]
    return torch.cat([each.reshape(-1) for each in tensors.values()])


def saved_residual(optimizer: torch.optim.Optimizer) -> Tensor:
    """The residual in an optimizer's state, of all parameters in order."""
    return torch.cat([each["residual"].reshape(-1) for each in optimizer.state_dict()["state"].values()])


class Counting(nn.Module):
    """Parameters from 0 that a step of SGD with learning rate 1 makes larger by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(30))

    def step(self, optimizer: torch.optim.Optimizer, times: int = 1, value: float = 1.0, **options: Any) -> None:
        for _ in range(times):
            self.count.grad = torch.full_like(self.count, -value)
            optimizer.step(**options)

    @property
    def sgd(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    @property
    def counted(self) -> float:
        assert (self.count == self.count[0]).all() or self.count.isnan().all()
        return float(self.count[0].item())
