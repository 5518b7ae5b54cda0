"""BatchNorm's statistics at x are those of the data, whatever the model was before, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from freestep import RemoteOptimizer, Run, reestimate_batchnorm

BATCHES = [torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(seed)) * (seed + 1) for seed in range(4)]


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6))
    return nn.Sequential(net, nn.BatchNorm1d(6, track_running_stats=False), nn.BatchNorm1d(6))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, wanted[name], rtol=1e-6, atol=1e-7)


def test_the_statistics_are_those_of_the_data() -> None:
    net, reference = network(), network()
    net(BATCHES[3] * 100)
    weights = copy.deepcopy(dict(net.named_parameters()))
    update_bn(BATCHES, reference)
    assert reestimate_batchnorm(net, BATCHES) == 2
    assert_same(buffers(net), buffers(reference))
    assert [int(buffer) for name, buffer in net.named_buffers() if "tracked" in name] == [4, 4]
    assert all(torch.equal(weights[name], parameter) for name, parameter in net.named_parameters())
    layers = [each for each in net.modules() if isinstance(each, nn.BatchNorm1d)]
    assert [each.momentum for each in layers] == [0.3, 0.1, 0.1]
    assert all(parameter.grad is None for parameter in net.parameters())


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda each: (each, "target"),
    "list": lambda each: [each, 0],
    "dict": lambda each: {"input": each},
    "dict and target": lambda each: ({"input": each}, 0),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_batches_come_in_many_forms(form: Callable[[Tensor], Any]) -> None:
    net, reference = network(), network()
    update_bn(BATCHES[:2], reference)
    assert reestimate_batchnorm(net, map(form, BATCHES), batches=2) == 2
    assert_same(buffers(net), buffers(reference))


def test_dropout_is_off_and_every_flag_is_as_before() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.norm, self.frozen = nn.Dropout(0.9), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, batch: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            result: Tensor = self.frozen(self.norm(self.drop(batch)))
            return result

    net = Net()
    net.frozen.eval()
    flags = [each.training for each in net.modules()]
    random = torch.get_rng_state()
    reestimate_batchnorm(net, BATCHES)
    assert [each.training for each in net.modules()] == flags == [True, True, True, False]
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(net.norm.running_mean, torch.stack([each.mean((0, 2)) for each in BATCHES]).mean(0))
    torch.testing.assert_close(net.frozen.running_mean, torch.zeros(3), atol=1e-6, rtol=0)


def test_inputs_are_moved_to_where_the_model_is() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.seen = nn.BatchNorm1d(3, affine=False), list[str]()
            self.weight = nn.Parameter(torch.zeros(3, device="meta"))

        def forward(self, batch: Tensor) -> None:
            self.seen.append(batch.device.type)
            self.norm(torch.ones(2, 3))

    net, batches = Net(), [(BATCHES[0], 0), {"batch": BATCHES[0]}, BATCHES[0].to("meta")]
    reestimate_batchnorm(net, batches)
    reestimate_batchnorm(net, batches[:1], device="cpu")
    # With parameters on several devices, the model knows.
    net.other = nn.Linear(1, 1)
    reestimate_batchnorm(net, batches)
    assert net.seen == ["meta", "meta", "meta", "cpu", "cpu", "cpu", "meta"]


def endless() -> Iterator[Tensor]:
    yield BATCHES[0]
    raise KeyError("damaged")


@pytest.mark.parametrize(
    ("loader", "error"),
    [([], ValueError), (endless(), KeyError), ([BATCHES[0], torch.zeros(2, 9)], RuntimeError)],
    ids=["empty", "damaged", "misshapen"],
)
def test_after_an_error_all_is_as_it_was(loader: Any, error: type[Exception]) -> None:
    net = network()
    net(BATCHES[1])
    before, flags = buffers(net), [each.training for each in net.modules()]
    with pytest.raises(error):
        reestimate_batchnorm(net, loader)
    assert_same(buffers(net), before)
    assert [each.training for each in net.modules()] == flags
    assert net[0][1].momentum == 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_a_half_model_are_averages_of_many_batches(dtype: torch.dtype) -> None:
    layer = nn.BatchNorm1d(3).to(dtype)
    batches = [torch.randn(32, 3, generator=torch.Generator().manual_seed(seed)) + 5 for seed in range(400)]
    reestimate_batchnorm(layer, [each.to(dtype) for each in batches])
    assert layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None
    assert (layer.running_mean.dtype, int(layer.num_batches_tracked)) == (dtype, 400)
    torch.testing.assert_close(layer.running_mean.float(), torch.cat(batches).mean(0), rtol=0.005, atol=0)
    torch.testing.assert_close(layer.running_var.float(), torch.cat(batches).var(0), rtol=0.01, atol=0)


def test_a_layer_that_is_called_several_times_has_the_average_of_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, batch: Tensor) -> Tensor:
            normalized: Tensor = self.norm(batch) + self.norm(2 * batch)
            return normalized

    net, reference = Twice(), Twice()
    update_bn(BATCHES, reference)
    assert reestimate_batchnorm(net, BATCHES) == 1
    assert_same(buffers(net), buffers(reference))


def test_a_layer_that_no_batch_comes_to_keeps_its_statistics(caplog: pytest.LogCaptureFixture) -> None:
    """As those of other domains, or of a head that is used in training alone."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleDict({domain: nn.BatchNorm1d(3) for domain in ("here", "there")})

        def forward(self, batch: Tensor, domain: str = "here") -> Tensor:
            normalized: Tensor = self.norms[domain](batch)
            return normalized

    net, reference = Net(), Net()
    net(BATCHES[3], "there")
    before = buffers(net.norms["there"])
    assert reestimate_batchnorm(net, BATCHES) == 1
    update_bn(BATCHES, reference)
    assert_same(buffers(net.norms["here"]), buffers(reference.norms["here"]))
    assert_same(buffers(net.norms["there"]), before)
    assert "1 of the model's 2 BatchNorm layers, such as 'norms.there'" in caplog.text


def test_a_model_without_batchnorm_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "freestep")
    unread = iter(BATCHES)
    assert reestimate_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), unread) == 0
    assert next(unread) is BATCHES[0]
    assert "no BatchNorm" in caplog.text


def test_at_x_the_model_normalizes_what_it_is_given(remotely: Callable[..., RemoteOptimizer], run: Run) -> None:
    net = network()
    optimizer = remotely(net, algorithm="sgd_schedule_free", lr=5.0)
    for batch in BATCHES * 3:
        optimizer.zero_grad()
        (net(batch) - 1).square().mean().backward()
        optimizer.step()
    optimizer.eval()
    net.eval()

    def spread() -> float:
        """How far the means of what the first layer has normalized are from 0."""
        with torch.no_grad():
            normalized = torch.cat([net[0][:2](batch) for batch in BATCHES])
            layer = net[0][1]
            return float(((normalized.mean((0, 2)) - layer.bias) / layer.weight).abs().max())

    before = spread()
    reestimate_batchnorm(net, BATCHES)
    assert spread() < 1e-5 < before / 100
