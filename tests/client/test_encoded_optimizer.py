"""A RemoteOptimizer that pushes encoded: the model gets what the residual lacks."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import encoded
from freestep import Client, FreestepError, RemoteOptimizer
from harness import ThreadService
from trained import held, saved_residual


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))


ENCODED: list[dict[str, Any]] = [
    {"push_dtype": "BF16"},
    {"push_dtype": "F16"},
    {"push_encoding": "int8"},
    {"push_encoding": "int8", "int8_block": 7},
    {"push_encoding": "topk", "topk_fraction": 0.05},
]


@pytest.fixture(params=ENCODED, ids=str)
def make(make: Callable[..., RemoteOptimizer], request: pytest.FixtureRequest) -> Callable[..., RemoteOptimizer]:
    """Makes optimizers of one run that takes every gradient off its parameters; they are closed with the test."""
    return partial(make, **{"algorithm": "sgd", "lr": 1.0, **request.param})


def push(model: nn.Module, optimizer: RemoteOptimizer, seed: int) -> Tensor:
    """Makes a step with a random gradient, and returns that."""
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * seed + number)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters() if parameter.grad is not None])


def run_of(optimizer: RemoteOptimizer) -> str:
    return str(optimizer.param_groups[0]["run"])


def assert_sums(model: nn.Module, optimizer: RemoteOptimizer, begun: Tensor, total: Tensor | float) -> None:
    lacking = saved_residual(optimizer) + begun - held(model)
    torch.testing.assert_close(lacking, torch.as_tensor(total).expand_as(lacking), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_model_gets_what_the_residual_lacks(
    service: ThreadService, make: Callable[..., RemoteOptimizer], shards: int
) -> None:
    model = network()
    begun, total = held(model), 0.0
    optimizer = make(model, shards=shards, worker="me")
    for seed in range(5):
        total = total + push(model, optimizer, seed)
    assert_sums(model, optimizer, begun, total)
    # The gradient counts under the new lease.
    with Client(service.url) as client:
        client.run(run_of(optimizer)).lease("me").release()
    total = total + push(model, optimizer, 5)
    assert_sums(model, optimizer, begun, total)


def test_another_number_of_shards_keeps_the_residual(
    service: ThreadService, make: Callable[..., RemoteOptimizer]
) -> None:
    model = network()
    begun, total = held(model), 0.0
    optimizer = make(model, shards=1)
    with Client(service.url) as client:
        for seed, shards in enumerate((3, 2, 1)):
            client.run(run_of(optimizer)).reshard(shards)
            # It is of an older epoch.
            push(model, optimizer, 100 + seed)
            assert optimizer.receipt is not None
            assert_sums(model, optimizer, begun, total)
            total = total + push(model, optimizer, seed)
            assert optimizer.receipt.decision == "applied"
            assert_sums(model, optimizer, begun, total)


@pytest.mark.parametrize("noticed", ["by a push", "by a pull"])
def test_a_run_that_goes_back_takes_the_residual_away(
    service: ThreadService, make: Callable[..., RemoteOptimizer], noticed: str
) -> None:
    model = network()
    optimizer = make(model)
    with Client(service.url) as client:
        run = client.run(run_of(optimizer))
        push(model, optimizer, 0)
        run.checkpoint()
        kept = held(model)
        push(model, optimizer, 1)
        run.restore(1)
        if noticed == "by a pull":
            optimizer.eval()
            optimizer.train()
        push(model, optimizer, 2)
        assert optimizer.receipt is not None
        assert optimizer.receipt.decision == "dropped"
        assert not saved_residual(optimizer).any()
        total = push(model, optimizer, 3)
    assert_sums(model, optimizer, kept, total)


def test_the_residual_is_saved_and_loaded(service: ThreadService, make: Callable[..., RemoteOptimizer]) -> None:
    model = network()
    begun = held(model)
    optimizer = make(model)
    total = push(model, optimizer, 0) + push(model, optimizer, 1)
    state = optimizer.state_dict()
    optimizer.close()
    again = network()
    resumed = make(again, worker="other", on_missing="join")
    assert not saved_residual(resumed).any()
    resumed.load_state_dict(state)
    assert_sums(again, resumed, begun, total)
    total += push(again, resumed, 2)
    assert_sums(again, resumed, begun, total)
    dense = make(network(), push_encoding="dense", push_dtype="F32")
    dense.load_state_dict(state)
    resumed.load_state_dict(dense.state_dict())
    assert not saved_residual(resumed).any()
    with Client(service.url) as client:
        client.run(run_of(resumed)).restore(0)
    resumed.load_state_dict(state)
    assert not saved_residual(resumed).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_encoding": "int4"}, "one of dense, int8, topk, not 'int4'"),
        ({"push_encoding": "int8", "push_dtype": "BF16"}, "excludes push_dtype"),
        ({"push_encoding": "topk", "topk_fraction": 0.0}, "above 0 and at most 1, not 0.0"),
        ({"push_encoding": "int8", "int8_block": 0}, "at least one element, not 0"),
        ({"push_encoding": "int8", "error_feedback": False}, "'int8' requires error_feedback"),
        ({"push_encoding": "topk", "error_feedback": False}, "'topk' requires error_feedback"),
    ],
)
def test_a_wrong_encoding_is_named(service: ThreadService, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FreestepError, match=message):
        RemoteOptimizer(network(), url=service.url, run="none", **options)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (network(), {}),
        (network(), {"push_dtype": "F32"}),
        (network(), {"push_dtype": "BF16", "error_feedback": False}),
        (network().bfloat16(), {"push_dtype": "BF16"}),
    ],
)
def test_where_nothing_is_lost_or_wanted_nothing_is_kept(
    service: ThreadService, model: nn.Module, options: dict[str, Any]
) -> None:
    with RemoteOptimizer(model, url=service.url, run=f"run-{uuid.uuid4().hex[:8]}", **options) as optimizer:
        assert not any("residual" in each for each in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("block", [7, 256])
def test_a_block_is_as_long_as_wanted(service: ThreadService, block: int) -> None:
    """Elements of one block are multiples of one scale."""
    model = network()
    begun = held(model)
    options: dict[str, Any] = {"algorithm": "sgd", "lr": 1.0, "push_encoding": "int8", "int8_block": block}
    with RemoteOptimizer(model, url=service.url, run=f"run-{uuid.uuid4().hex[:8]}", **options) as optimizer:
        gradient = push(model, optimizer, 0)
    expected, metadata = encoded.int8(
        {"w": gradient[:300], "b": gradient[300:350], "v": gradient[350:500], "c": gradient[500:]}, block
    )
    said = encoded.decoded(expected, metadata, {"w": (300,), "b": (50,), "v": (150,), "c": (3,)})
    torch.testing.assert_close(begun - held(model), torch.cat([*said.values()]), rtol=0, atol=1e-6)
