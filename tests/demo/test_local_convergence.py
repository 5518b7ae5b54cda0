"""Two workers train the demo's model and push once in ten steps; a worker without a service is the baseline."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from freestep import Client, LocalSteps
from freestep.demo.data import Digits, load
from freestep.demo.model import SmallConvNet
from harness import ThreadService
from meanwhile import at_once

pytestmark = [pytest.mark.slow, pytest.mark.evidence]

STEPS, EVERY = 300, 10


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load()


def inner_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return SmallConvNet()


def take_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, digits: Digits, generator: torch.Generator) -> None:
    chosen = torch.randint(len(digits.train_labels), (32,), generator=generator)
    optimizer.zero_grad()
    cross_entropy(model(digits.train_images[chosen]), digits.train_labels[chosen]).backward()
    optimizer.step()


@torch.no_grad()
def final_loss(model: nn.Module, digits: Digits) -> Tensor:
    return cross_entropy(model(digits.test_images), digits.test_labels)


@pytest.fixture(scope="module")
def alone(digits: Digits) -> Tensor:
    """The loss of AdamW after STEPS steps without a service."""
    model, generator = network(), torch.Generator().manual_seed(0)
    optimizer = inner_of(model)
    for _ in range(STEPS):
        take_a_step(model, optimizer, digits, generator)
    return final_loss(model, digits)


def trained(
    service: ThreadService, digits: Digits, options: dict[str, Any], play: Callable[..., Any]
) -> tuple[Tensor, int]:
    """The loss at x after two workers took STEPS steps each, and how often they pushed."""
    name = f"convergence-{uuid.uuid4().hex[:8]}"
    models = [network() for _ in range(2)]
    optimizers = [
        LocalSteps(each, inner_of(each), every=EVERY, url=service.url, run=name, **options) for each in models
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]

    def step(worker: int) -> None:
        take_a_step(models[worker], optimizers[worker], digits, generators[worker])

    play(step)
    for optimizer in optimizers:
        optimizer.flush()
    optimizers[0].eval()
    with Client(service.url) as client:
        pushes = sum(client.run(name).status().pushes.values())
    for optimizer in optimizers:
        optimizer.close()
    return final_loss(models[0], digits), pushes


@pytest.mark.parametrize("algorithm", ["diloco", "gpa_sgd"])
def test_two_workers_that_wait_for_each_other(
    service: ThreadService, digits: Digits, alone: Tensor, algorithm: str
) -> None:
    def together(step: Callable[[int], None]) -> None:
        def work(worker: int) -> None:
            for _ in range(STEPS):
                step(worker)

        at_once(partial(work, 0), partial(work, 1))

    loss, pushes = trained(service, digits, {"algorithm": algorithm, "aggregation": "sync"}, together)
    assert pushes == 2 * STEPS // EVERY
    assert loss < 1.1 * alone


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "diloco", "momentum_period": 2},
        {"algorithm": "diloco", "momentum_period": 4, "push_dtype": "BF16", "overlap": True},
        {"algorithm": "sgd_schedule_free", "lr": 4.0},
    ],
)
def test_two_workers_that_do_not_wait(
    service: ThreadService, digits: Digits, alone: Tensor, options: dict[str, Any]
) -> None:
    """In turn, so that each pushes a round that is one push old. Nesterov momentum without a delay diverges here."""

    def in_turn(step: Callable[[int], None]) -> None:
        for _ in range(STEPS):
            for worker in range(2):
                step(worker)

    loss, pushes = trained(service, digits, {"aggregation": "async", **options}, in_turn)
    assert pushes == 2 * STEPS // EVERY
    assert loss < 1.5 * alone
