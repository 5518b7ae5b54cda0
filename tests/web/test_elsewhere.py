"""A service whose shards are not where its bodies arrive, as with a GPU, but without one: the host plays its part.

Everything on the way there and back is what a GPU sees, but for pinning and streams: bodies cross as they came, are
decoded by torch, and update the state by kernels that were compiled when the run was loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import encoded
from freestep_service import app
from freestep_service.optimizers.kernels import fused, points, quanta, squares, sweep
from harness import ThreadService
from plain_calls import Api

SHAPES = {"matrix": (37, 7), "scalar": (), "empty": (0, 4), "long": (1000,)}
SPEC: dict[str, Any] = {
    "optimizer": {"algorithm": "adamw_schedule_free", "lr": 0.01, "max_grad_norm": 20.0},
    "parameters": [
        {"name": name, "shape": list(shape), "group": "slow" if name == "scalar" else "default"}
        for name, shape in SHAPES.items()
    ],
    "groups": {"slow": {"lr": 0.001}},
}


def random_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def bodies() -> list[bytes]:
    """Gradients, one in each encoding."""
    tensors = [random_tensors(seed) for seed in range(1, 6)]
    return [
        encoded.assemble(tensors[0], {}),
        encoded.assemble({name: each.bfloat16() for name, each in tensors[1].items()}, {}),
        encoded.assemble({name: each.half() for name, each in tensors[2].items()}, {}),
        encoded.assemble(*encoded.int8(tensors[3])),
        encoded.assemble(*encoded.topk(tensors[4], 0.1)),
    ]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on, services begin with their shards on the host, under a name that is not HOST's."""

    def begin() -> None:
        for module in (points, quanta, squares, sweep):
            monkeypatch.setattr(module, "is_compiled", lambda vector: False)
        monkeypatch.setattr(fused, "BACKEND", "aot_eager")
        fused._kernel.cache_clear()
        monkeypatch.setattr(app, "choose_device", lambda name: torch.device("cpu", 0))

    return begin


def trained(api: Api, aggregation: dict[str, Any]) -> dict[str, Tensor]:
    """The points after a push of each body, by point and name."""
    assert api.http.put(api.path(), json={**SPEC, "aggregation": aggregation}).status_code == 201
    assert api.initialize(random_tensors(0)).status_code == 201
    lease, step = api.lease(), 0
    for body in bodies():
        receipt = api.push(lease, step, body=body).json()
        step = receipt["step"]
    assert step == (5 if aggregation["policy"] == "async" else 2)
    return points_of(api)


def points_of(api: Api) -> dict[str, Tensor]:
    found = {}
    for point in "xyz":
        for dtype in ("F32", "BF16", "I8"):
            tensors, _ = api.pull(point, dtype=dtype)
            found |= {f"{point} {dtype} {name}": tensor for name, tensor in tensors.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", [{"policy": "async"}, {"policy": "buffered", "batch": 2}])
def test_a_run_is_what_it_is_on_the_host(
    aggregation: dict[str, Any],
    elsewhere: Callable[[], None],
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = trained(connect(start_service(tmp_path / "host").url), aggregation)
    elsewhere()
    service = start_service(tmp_path / "elsewhere")
    api = connect(service.url)
    found = trained(api, aggregation)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # A quantum or a digit of BF16, where the last bit of fp32 decides.
        tolerance = {
            "F32": {"rtol": 1e-5, "atol": 1e-6},
            "BF16": {"rtol": 8e-3, "atol": 1e-6},
            "I8": {"rtol": 0, "atol": 1},
        }
        torch.testing.assert_close(found[name], tensor, **tolerance[name.split()[1]])
    assert fused._kernel.cache_info().currsize > 0
    assert not [each.getMessage() for each in caplog.records if "is not compiled" in each.getMessage()]
    # What it was compiled for goes for the state that is loaded, too.
    service.stop()
    again = connect(start_service(tmp_path / "elsewhere").url, api.run)
    for name, tensor in points_of(again).items():
        assert torch.equal(tensor, found[name])
    assert again.push(again.lease(), again.pull()[1], body=bodies()[0]).json()["decision"] in ("applied", "accumulated")


def test_what_is_not_finite_is_refused(
    elsewhere: Callable[[], None], start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    elsewhere()
    api = connect(start_service().url)
    api.create()
    body = encoded.assemble({"w": torch.full((2, 3), torch.nan), "b": torch.tensor(1.0), "e": torch.zeros(0, 4)}, {})
    answer = api.push(api.lease(), 0, body=body)
    assert answer.json()["type"] == "urn:freestep:problem:non-finite-gradient"
    assert api.pull()[1] == 0
