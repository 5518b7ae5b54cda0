"""A finite gradient that F16 cannot hold is refused by its tensor's name and its value, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from every_encoder import MAKERS, MANIFEST, filled, said, whole
from freestep import DtypeOverflow, Flat, LocalSteps, NonFiniteGradient, RemoteOptimizer, Run
from freestep.encoders import Encoder

Make = Callable[..., RemoteOptimizer]

LARGEST = 65504.0
HALVES = ["f16", "topk-f16"]


def with_one(value: float) -> Flat:
    """Random numbers, and one value in the tensor `n`, which two shards share."""
    flat = filled()
    flat.views["n"][300] = value
    return flat


def begun(name: str, value: float) -> Encoder:
    encoder = MAKERS[name](with_one(value))
    encoder.begin()
    return encoder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("value", [1e5, -1e5, 65520.0, 3e38])
@pytest.mark.parametrize("name", HALVES)
def test_an_encoder_names_tensor_and_value(name: str, value: float, shards: int) -> None:
    encoder = begun(name, value)
    with pytest.raises(DtypeOverflow, match=rf"'n' has the value {value:.6g}".replace("+", r"\+")):
        encoder.parts(shards)


@pytest.mark.parametrize("value", [LARGEST, -LARGEST, 65519.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", HALVES)
def test_what_f16_holds_and_what_is_not_finite_is_sent(name: str, value: float) -> None:
    """The service refuses infinities and NaN."""
    whole(begun(name, value))


@pytest.mark.parametrize("name", HALVES)
def test_an_infinity_elsewhere_does_not_hide_it(name: str) -> None:
    encoder = begun(name, 1e5)
    encoder.gradient.views["b"][0] = float("inf")
    with pytest.raises(DtypeOverflow, match=r"'n' has the value 100000"):
        encoder.parts(1)


@pytest.mark.parametrize("name", HALVES)
def test_the_residual_is_what_it_was(name: str) -> None:
    encoder, other = MAKERS[name](filled()), MAKERS[name](filled())
    for each in (encoder, other):
        each.begin()
        whole(each)
        each.settle(True)
    kept = encoder.gradient.vector.clone()
    encoder.gradient.views["n"][300] = 1e5
    encoder.begin()
    with pytest.raises(DtypeOverflow):
        whole(encoder)
    assert torch.equal(encoder.residual, other.residual)
    encoder.gradient.vector.copy_(kept)
    for each in (encoder, other):
        each.begin()
    assert torch.equal(said(encoder), said(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_flat_vector_names_tensor_and_value(dtype: torch.dtype) -> None:
    flat, tensors = Flat(MANIFEST, "F16"), {name: view.to(dtype) for name, view in with_one(-131072.0).views.items()}
    with pytest.raises(DtypeOverflow, match="'n' has the value -131072"):
        flat.fill(tensors)
    with pytest.raises(DtypeOverflow, match="'n' has the value -131072"):
        flat.fill({**tensors, "n": tensors["n"].to_sparse()})
    flat.fill({**tensors, "n": torch.full([512], float("inf"), dtype=torch.float16)})
    Flat(MANIFEST, "BF16").fill(tensors)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def set_gradients(net: nn.Module, value: float) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net.bias.grad[1] = value  # type: ignore[index, union-attr]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"error_feedback": False}, {"push_encoding": "topk", "topk_fraction": 1.0}], ids=str
)
def test_a_step_is_refused_and_the_next_one_counts(
    remotely: Make, run: Run, options: dict[str, object], overlap: bool
) -> None:
    net = model()
    optimizer = remotely(net, push_dtype="F16", **options)
    before = run.pull("y")[0]
    set_gradients(net, 1e5)
    with pytest.raises(DtypeOverflow, match="'bias' has the value 100000, which F16 cannot hold: push it as BF16"):
        optimizer.step(overlap=overlap)
        optimizer.flush()
    assert run.status().pushes == {"applied": 0, "accumulated": 0, "dropped": 0}
    set_gradients(net, 2.0)
    optimizer.step(overlap=overlap)
    optimizer.flush()
    after, step = run.pull("y")
    assert step == 1
    torch.testing.assert_close(before["bias"] - after["bias"], torch.tensor([1.0, 2.0]))
    set_gradients(net, float("inf"))
    with pytest.raises(NonFiniteGradient):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"error_feedback": False}], ids=str)
def test_a_round_is_lost_as_one_that_is_not_finite_is(
    locally: Callable[..., LocalSteps], run: Run, options: dict[str, object]
) -> None:
    net = model()
    optimizer = locally(net, torch.optim.SGD(net.parameters(), lr=1.0), every=1, push_dtype="F16", **options)
    before = run.pull("y")[0]
    set_gradients(net, 1e5)
    with pytest.raises(DtypeOverflow, match="'bias'"):
        optimizer.step()
    assert torch.equal(net.bias.detach(), before["bias"])
    set_gradients(net, 2.0)
    optimizer.step()
    assert run.status().step == 1
