"""Names of parameters: plain whatever wraps the model, and fitted to a run's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from freestep import ManifestMismatch, RemoteOptimizer, Run
from freestep.names import are_numbered, fitted_names, numbered_names, plain_names
from trained import held, loss_of, network

Make = Callable[..., RemoteOptimizer]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("0.weight", "0.weight"),
        ("_orig_mod.0.weight", "0.weight"),
        ("module.0.weight", "0.weight"),
        ("module._orig_mod.layers.module.3._checkpoint_wrapped_module.bias", "layers.3.bias"),
        ("_fsdp_wrapped_module.net._fsdp_wrapped_module.weight", "net.weight"),
        ("modules.weight", "modules.weight"),
        # The parameter's own name is never a wrapper's.
        ("block.module", "block.module"),
        ("module", "module"),
    ],
)
def test_what_wrappers_add_is_taken_out(name: str, plain: str) -> None:
    assert plain_names([name]) == [plain]


def test_names_that_would_be_the_same_stay_as_they_are() -> None:
    names = ["encoder.weight", "module.encoder.weight"]
    assert plain_names(names) == names


def test_numbered_names_are_known() -> None:
    assert are_numbered(numbered_names(3, 2))
    assert not are_numbered([*numbered_names(0, 2), "weight"])
    assert not are_numbered(["group0.0.weight"])


def test_names_are_fitted_by_order_and_shape_only_where_a_side_has_none() -> None:
    named = {"a": (2, 3), "b": (3,)}
    numbered = {"group0.0": (2, 3), "group0.1": (3,)}
    assert fitted_names(named, numbered, "run") == {"a": "group0.0", "b": "group0.1"}
    assert fitted_names(numbered, named, "run") == {"group0.0": "a", "group0.1": "b"}
    assert fitted_names({"b": (3,), "a": (2, 3)}, named, "run") == {"a": "a", "b": "b"}
    for other in ({"c": (2, 3), "d": (3,)}, {"group0.0": (3,), "group0.1": (2, 3)}, {"group0.0": (2, 3)}):
        with pytest.raises(ManifestMismatch):
            fitted_names(other, named, "run")


def test_a_mismatch_lists_what_differs() -> None:
    expected = {f"layer{number}": (number,) for number in range(15)} | {"same": (1,), "head": (10, 5)}
    with pytest.raises(ManifestMismatch) as caught:
        fitted_names({"same": (1,), "head": (11, 5), "extra": ()}, expected, "mine")
    text = str(caught.value)
    assert "'mine'" in text
    assert "missing: layer0 [0], layer1 [1]" in text
    assert "layer9 [9] and 5 more" in text
    assert "layer10" not in text
    assert "not in the run: extra []" in text
    assert "of other shapes: head [11, 5], in the run [10, 5]" in text
    assert "same" not in text


def wrapped(net: nn.Sequential, how: str) -> nn.Module:
    if how == "compiled":
        compiled: nn.Module = torch.compile(net)  # type: ignore[assignment]
        return compiled
    if how == "parallel":
        return nn.DataParallel(net)
    if how == "checkpointed":
        net[0] = checkpoint_wrapper(net[0])
    return net


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["compiled", "parallel", "checkpointed"])
def test_wrapped_and_plain_workers_share_a_run(remotely: Make, run: Run, how: str) -> None:
    plain, other = network(0), network(1)
    first = remotely(plain)
    model = wrapped(other, how)
    assert {name for name, _ in model.named_parameters()} != {name for name, _ in plain.named_parameters()}
    second = remotely(model)
    assert torch.equal(held(plain), held(model))
    for name, tensor in model.named_parameters():
        tensor.grad = torch.full_like(tensor, float("bias" in name))
    second.step()
    first.train()
    assert torch.equal(held(plain), held(model))
    assert set(run.pull("x")[0]) == {name for name, _ in plain.named_parameters()}


@pytest.mark.parametrize("named_first", [True, False])
def test_numbered_parameters_join_by_order_and_shape(
    remotely: Make, run: Run, named_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    forms: list[Any] = [network(0), list(network(1).parameters())]
    if not named_first:
        forms.reverse()
    with caplog.at_level(logging.WARNING, "freestep"):
        first, second = (remotely(form, worker=f"w{number}") for number, form in enumerate(forms))
        for optimizer in (first, second):
            loss_of(network(2), 0)
            optimizer.step(allow_empty=True)
    assert run.status().step == 2
    assert ("does not fit" in caplog.text) is not named_first
    assert are_numbered(run.pull("x")[0]) is not named_first


def test_a_name_cannot_be_used_twice(remotely: Make, run: Run) -> None:
    tensors = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    with pytest.raises(ManifestMismatch, match="two parameters are named 'w'"):
        remotely([{"params": [("w", tensors[0])]}, {"params": [("w", tensors[1])]}])
