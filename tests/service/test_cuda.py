"""The same run on a GPU. Without one these tests are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import encoded
from forms import FORMS, own
from freestep.encoding import INT8
from freestep.manifest import Manifest
from freestep.models import RunSpec
from freestep_service.optimizers import Blocks, Quanta
from freestep_service.shard import Entry, Shard
from harness import TENSORS, Api, ThreadService

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

STEPS = 50


def trained(device: str, form: str, aggregation: dict[str, Any]) -> Shard:
    """A shard after STEPS entries of random gradients."""
    spec = RunSpec.model_validate(
        {
            "optimizer": FORMS[form],
            "aggregation": aggregation,
            "parameters": [{"name": "w", "shape": [300, 7]}, {"name": "v", "shape": [5], "group": "slow"}],
            "groups": {"slow": own(form, lr=0.001, weight_decay=0.1)},
        }
    )
    generator = torch.Generator().manual_seed(0)
    shard = Shard(spec, Manifest(spec.parameters), torch.device(device))
    shard.initialize(torch.randn(shard.manifest.numel, generator=generator), epoch=1)
    for seq in range(1, STEPS + 1):
        gradient = torch.randn(shard.manifest.numel, generator=generator)
        shard.apply(Entry(seq, 1, advance=seq % 2 == 0 or aggregation["policy"] == "async", gradient=gradient))
    return shard


@pytest.mark.parametrize("aggregation", [{"policy": "async"}, {"policy": "buffered", "batch": 2}])
@pytest.mark.parametrize("form", FORMS)
def test_points_are_those_of_the_cpu(form: str, aggregation: dict[str, Any]) -> None:
    shards = [trained(device, form, aggregation) for device in ("cpu", "cuda")]
    for point in ("x", "y", "z"):
        outs = [torch.empty(shard.manifest.numel) for shard in shards]
        positions = [shard.copy_point(point, out) for shard, out in zip(shards, outs, strict=True)]
        assert positions[0] == positions[1]
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["sgd", "adamw_schedule_free"])
def test_int8_is_that_of_the_fp32_points(algorithm: str) -> None:
    shard = trained("cuda", algorithm, {"policy": "async"})
    blocks = Blocks.of(shard.manifest, INT8)
    for point in ("x", "y", "z"):
        out = Quanta(torch.empty(shard.manifest.numel, dtype=torch.int8), torch.empty(len(blocks.bounds) - 1), blocks)
        wide = torch.empty(shard.manifest.numel)
        assert shard.copy_point(point, out) == shard.copy_point(point, wide)
        expected, _ = encoded.int8(dict(zip("wv", wide.split((2100, 5)), strict=True)))
        assert torch.equal(out.scales, torch.cat([expected["w::scale"], expected["v::scale"]]))
        assert torch.equal(out.quanta, torch.cat([expected["w"], expected["v"]]))


def test_a_cut_comes_back_on_the_gpu() -> None:
    shard = trained("cuda", "adamw_schedule_free", {"policy": "async"})
    cut = shard.cut()
    assert {tensor.device.type for tensor in cut.tensors.values()} == {"cpu"}
    outs = [torch.empty(shard.manifest.numel) for _ in range(2)]
    shard.copy_point("x", outs[0])
    shard.load(cut, epoch=2)
    shard.copy_point("x", outs[1])
    assert torch.equal(*outs)


def test_a_run_is_served_from_the_gpu(start_service: Callable[..., ThreadService], connect: Callable[..., Api]) -> None:
    api = connect(start_service(device="cuda").url)
    api.create()
    assert api.push(api.lease(), 0).json()["decision"] == "applied"
    x, step = api.pull("x")
    assert step == 1
    torch.testing.assert_close(x["w"], 0.5 * TENSORS["w"])
