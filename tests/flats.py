"""A run's state vectors, driven as a shard drives them, and torch's optimizers beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.optimizers import Conditions, Gradient, initial_buffers, interpolate, method_of, segments, step

STEPS = 250
SHAPES = {"matrix": (7, 5), "scalar": (), "empty": (0, 4), "cube": (3, 5, 7), "vector": (13,)}
GROUPS = {"matrix": "default", "scalar": "second", "empty": "second", "cube": "default", "vector": "second"}
"""The groups alternate, so that a group has several segments."""
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
"""After STEPS steps, torch's own fp32 is up to 5e-6 away from its fp64."""


class Flat:
    """A run's state vectors, driven as the shard drives them."""

    def __init__(self, optimizer: dict[str, Any], second: dict[str, Any], weights: dict[str, Tensor]) -> None:
        spec = RunSpec.model_validate(
            {
                "optimizer": optimizer,
                "parameters": [
                    {"name": name, "shape": list(weight.shape), "group": GROUPS.get(name, "default")}
                    for name, weight in weights.items()
                ],
                "groups": {"second": second},
            }
        )
        self.slots = Manifest(spec.parameters).slots
        self.method = method_of(spec.optimizer)
        self.layout = segments(self.slots)
        self.hyperparameters = {each.group: spec.hyperparameters(each.group) for each in self.layout}
        self.buffers = initial_buffers(self.method, self.join(weights))
        self.scalars = dict.fromkeys(self.hyperparameters, self.method.initial)

    def join(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[slot.name].reshape(-1) for slot in self.slots])

    def step(
        self,
        gradients: dict[str, Tensor],
        damping: float = 1.0,
        scale: float = 1.0,
        max_lr: float = math.inf,
        staleness: float = 0.0,
        loss: float = 0.0,
    ) -> None:
        gradient, taken = Gradient(self.join(gradients), scale), Conditions(damping, max_lr, staleness, loss)
        self.scalars = step(self.method, self.layout, self.hyperparameters, self.scalars, self.buffers, gradient, taken)

    def observe(self, name: str, value: float) -> None:
        self.scalars = {
            group: self.method.observe(self.hyperparameters[group], scalars, name, value)
            for group, scalars in self.scalars.items()
        }

    def point(self, name: str) -> dict[str, Tensor]:
        out = torch.empty_like(self.buffers["y"])
        interpolate(self.method, self.layout, self.hyperparameters, self.scalars, self.buffers, name, out)  # type: ignore[arg-type]
        return {slot.name: out[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in self.slots}


def initial_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def random_gradients(count: int, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def step_together(
    flat: Flat, exact: Flat, references: Mapping[str, Any], gradients: Iterable[dict[str, Tensor]], damped: bool
) -> None:
    """Takes the same steps by state vectors in fp32, by others in fp64, and by each tensor's reference."""
    for number, each in enumerate(gradients):
        damping = 1 / (1 + number % 5) if damped else 1.0
        flat.step(each, damping=damping)
        exact.step({name: gradient.double() for name, gradient in each.items()}, damping=damping)
        for name, reference in references.items():
            reference.step(each[name], damping)


def torch_groups(parameters: dict[str, nn.Parameter], second: dict[str, Any]) -> list[dict[str, Any]]:
    first = [parameter for name, parameter in parameters.items() if GROUPS[name] == "default"]
    other = [parameter for name, parameter in parameters.items() if GROUPS[name] == "second"]
    return [{"params": first}, {"params": other, **second}]


def assert_points(actual: dict[str, Tensor], expected: dict[str, nn.Parameter]) -> None:
    for name, parameter in expected.items():
        torch.testing.assert_close(actual[name], parameter.detach(), **TOLERANCE)
