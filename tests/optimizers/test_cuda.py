"""The same run on a GPU. Without one these tests are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import encoded
from forms import FORMS, hyperparameters, own
from freestep.api.models import ParameterSpec, RunSpec
from freestep.wire.encoding import ENCODINGS, INT8
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver, lay
from freestep_service.optimizers import Blocks, Gradient, Quanta, Segment, initial_buffers, method_of, step
from freestep_service.optimizers.kernels import fused, squares, sweep
from freestep_service.state.buffers import Vector
from freestep_service.state.decode import decode_and_measure
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard
from harness import ThreadService
from plain_calls import TENSORS, Api

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inductor's own imports warn
]

STEPS = 50


def spec_of(form: str, aggregation: dict[str, Any]) -> RunSpec:
    return RunSpec.model_validate(
        {
            "optimizer": FORMS[form],
            "aggregation": aggregation,
            "parameters": [{"name": "w", "shape": [300, 7]}, {"name": "v", "shape": [5], "group": "slow"}],
            "groups": {"slow": own(form, lr=0.001, weight_decay=0.1)},
        }
    )


def trained(device: str, form: str, aggregation: dict[str, Any]) -> Shard:
    """A shard after STEPS entries of random gradients."""
    spec = spec_of(form, aggregation)
    generator = torch.Generator().manual_seed(0)
    shard = Shard(spec, Manifest(spec.parameters), torch.device(device))
    shard.initialize(torch.randn(shard.manifest.numel, generator=generator), epoch=1)
    for seq in range(1, STEPS + 1):
        gradient = torch.randn(shard.manifest.numel, generator=generator)
        shard.apply(Entry(seq, 1, advance=seq % 2 == 0 or aggregation["policy"] == "async", gradient=gradient))
    return shard


@pytest.mark.parametrize(
    "aggregation",
    [
        {"policy": "async"},
        {"policy": "buffered", "batch": 2},
        {"policy": "quorum", "batch": 3, "robust": "coordinate_median"},
        {"policy": "quorum", "batch": 5, "robust": "krum", "f": 1, "m": 2},
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_points_equal_the_cpus(form: str, aggregation: dict[str, Any]) -> None:
    shards = [trained(device, form, aggregation) for device in ("cpu", "cuda")]
    for point in ("x", "y", "z"):
        outs = [torch.empty(shard.manifest.numel) for shard in shards]
        positions = [shard.copy_point(point, out) for shard, out in zip(shards, outs, strict=True)]
        assert positions[0] == positions[1]
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["sgd", "adamw_schedule_free"])
def test_int8_points_equal_the_fp32_points_in_int8(algorithm: str) -> None:
    shard = trained("cuda", algorithm, {"policy": "async"})
    blocks = Blocks.of(shard.manifest, INT8)
    for point in ("x", "y", "z"):
        out = Quanta(torch.empty(shard.manifest.numel, dtype=torch.int8), torch.empty(len(blocks.bounds) - 1), blocks)
        wide = torch.empty(shard.manifest.numel)
        assert shard.copy_point(point, out) == shard.copy_point(point, wide)
        expected, _ = encoded.int8(dict(zip("wv", wide.split((2100, 5)), strict=True)))
        assert torch.equal(out.scales, torch.cat([expected["w::scale"], expected["v::scale"]]))
        assert torch.equal(out.quanta, torch.cat([expected["w"], expected["v"]]))


@pytest.mark.parametrize("aggregation", [{"policy": "async"}, {"policy": "buffered", "batch": 2}])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_has_all_its_kernels_once_it_is_prepared(
    form: str, aggregation: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(form, aggregation)
    Shard(spec, Manifest(spec.parameters), torch.device("cuda")).prepare()
    kernels, graphs = fused._kernel.cache_info().currsize, counters["stats"]["unique_graphs"]
    assert kernels > 0
    trained("cuda", form, aggregation)
    assert fused._kernel.cache_info().currsize == kernels
    assert counters["stats"]["unique_graphs"] == graphs
    assert not [record for record in caplog.records if record.name == "freestep"]


@pytest.mark.parametrize("numel", [2, 1000, 5_000_003])
@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_equals_torchs_evaluation(form: str, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within rounding: it contracts, and its division is the GPU's."""
    generator = torch.Generator("cuda").manual_seed(0)
    chosen = {"": hyperparameters(form)}
    method, layout = method_of(chosen[""]), [Segment("", 0, numel // 2 + 1), Segment("", numel // 2 + 1, numel)]
    weights = torch.randn(numel, generator=generator, device="cuda")
    gradients = [torch.randn(numel, generator=generator, device="cuda") for _ in range(8)]
    states = []
    for is_fused in (True, False):
        if not is_fused:
            monkeypatch.setattr(sweep, "apply_kernel", lambda *given: False)
        buffers, scalars = initial_buffers(method, weights.clone()), {"": method.initial}
        for pushed, gathered in zip(gradients, [None, *gradients[:-1]], strict=True):
            scalars = step(method, layout, chosen, scalars, buffers, Gradient(pushed, 0.5, 0.7, gathered))
        states.append(buffers)
    for name, buffer in states[1].items():
        # Sums of large numbers may come out small.
        largest = max(1.0, float(buffer.abs().max()))
        torch.testing.assert_close(states[0][name], buffer, rtol=1e-5, atol=1e-6 * largest)


BODIES = [
    ("dense F32", lambda tensors: encoded.assemble(tensors, {})),
    ("dense BF16", lambda tensors: encoded.assemble({name: each.bfloat16() for name, each in tensors.items()}, {})),
    ("dense F16", lambda tensors: encoded.assemble({name: each.half() for name, each in tensors.items()}, {})),
    ("int8", lambda tensors: encoded.assemble(*encoded.int8(tensors))),
    ("topk", lambda tensors: encoded.assemble(*encoded.topk(tensors, 0.1))),
]


@pytest.mark.parametrize("numel", [1, 1000, 2 * squares.PIECE + 17])
@pytest.mark.parametrize(("name", "make"), BODIES, ids=[name for name, _ in BODIES])
def test_a_body_is_decoded_as_on_the_host(name: str, make: Callable[[dict[str, Tensor]], bytes], numel: int) -> None:
    manifest = Manifest([ParameterSpec(name=each, shape=(numel,)) for each in "vw"])
    generator = torch.Generator().manual_seed(numel)
    vectors = [Vector(manifest.numel, device=torch.device(device)) for device in ("cpu", "cuda")]
    # Again and again, as memory is used.
    for _ in range(3):
        body = make({each: torch.randn(numel, generator=generator) for each in "vw"})
        tensors, norms = [], []
        for vector in vectors:
            receiver = Receiver(manifest, vector.bytes, len(body), encodings=ENCODINGS)
            lay(receiver, body)
            tensor, norm = decode_and_measure(vector, manifest, receiver)
            tensors.append(Gradient(tensor).evaluated(torch.float32))
            norms.append(norm)
        assert vectors[1].tensor().is_pinned()
        assert tensors[1].device.type == "cuda"
        assert torch.equal(tensors[1].cpu(), tensors[0])
        assert norms[1] == pytest.approx(norms[0], rel=1e-12)


def test_an_element_that_is_not_finite_is_found() -> None:
    manifest = Manifest([ParameterSpec(name="w", shape=(5,))])
    vector = Vector(5, device=torch.device("cuda"))
    for value in (math.nan, math.inf, -math.inf):
        body = encoded.assemble({"w": torch.tensor([1, 2, value, 4, 5])}, {})
        receiver = Receiver(manifest, vector.bytes, len(body))
        lay(receiver, body)
        assert decode_and_measure(vector, manifest, receiver)[1] is None


def test_a_copy_of_the_state_is_loaded_on_the_gpu() -> None:
    shard = trained("cuda", "adamw_schedule_free", {"policy": "async"})
    copy = shard.copy_state()
    assert {tensor.device.type for tensor in copy.tensors.values()} == {"cpu"}
    outs = [torch.empty(shard.manifest.numel) for _ in range(2)]
    shard.copy_point("x", outs[0])
    shard.load(copy, epoch=2)
    shard.copy_point("x", outs[1])
    assert torch.equal(*outs)


def test_a_run_is_served_from_the_gpu(start_service: Callable[..., ThreadService], connect: Callable[..., Api]) -> None:
    api = connect(start_service(device="cuda").url)
    api.create()
    assert api.push(api.lease(), 0).json()["decision"] == "applied"
    x, step = api.pull("x")
    assert step == 1
    torch.testing.assert_close(x["w"], 0.5 * TENSORS["w"])
