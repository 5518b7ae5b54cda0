"""ScheduleFree+ against its plain reference, and through the service, which refuses a push without a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flats import STEPS, Flat, initial_weights, random_gradients
from freestep import InvalidSpec, RemoteOptimizer
from freestep_service.optimizers import Gradient
from freestep_service.optimizers.kernels.slices import MIN_SLICE
from freestep_service.optimizers.kernels.sums import BLOCK, gradient_sums
from harness import ThreadService
from plain_calls import TENSORS, Api, slug
from raw_pushes import answered, begun_push
from reference import AdamCPlus

PLUS = {"algorithm": "adamc_schedule_free_plus"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 20.0, "lr": 0.5, "eps": 1e-6},
    {"sf_beta1": 0.8, "sf_beta1_anneal_steps": 100, "sf_beta1_max": 0.98, "betas": (0.0, 0.9)},
    {"polyak_beta": 0.9, "c_warmup": 20, "warmup_steps": 10, "r": 2.0, "weight_lr_power": 1.0},
]


def losses(number: int) -> float:
    """Losses, some of them so low that the step size is 0."""
    return 3 * math.cos(number) + 1


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_equals_the_papers(options: dict[str, Any], damped: bool) -> None:
    weights = initial_weights()
    twin = AdamCPlus(weights, **options)
    flat = Flat({**PLUS, **options}, {}, weights)
    exact = Flat({**PLUS, **options}, {}, {name: weight.double() for name, weight in weights.items()})
    for number, gradients in enumerate(random_gradients(STEPS)):
        damping = 1 / (1 + number % 5) if damped else 1.0
        # The gradients are random: a loss to fit them would make no difference.
        twin.step(gradients, losses(number), damping)
        flat.step(gradients, damping=damping, loss=losses(number))
        exact.step({name: each.double() for name, each in gradients.items()}, damping=damping, loss=losses(number))
    for point, expected in (("x", twin.x), ("y", twin.y), ("z", twin.z)):
        for name, tensor in expected.items():
            torch.testing.assert_close(flat.point(point)[name], tensor.float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(exact.point(point)[name], tensor, rtol=1e-9, atol=1e-11)


def test_the_polyak_step_size_is_of_all_groups() -> None:
    """A group's own learning rate multiplies it."""
    weights = {name: torch.ones(4, dtype=torch.float64) for name in ("matrix", "vector")}
    flat = Flat(PLUS, {"lr": 0.25}, weights)
    flat.step({"matrix": torch.ones(4, dtype=torch.float64), "vector": -torch.ones(4, dtype=torch.float64)}, loss=2.0)
    polyak = 2.0 / (math.sqrt(math.pi / 2) * 8)
    torch.testing.assert_close(flat.point("z")["matrix"], weights["matrix"] - polyak)
    torch.testing.assert_close(flat.point("z")["vector"], weights["vector"] + polyak / 4)


@pytest.mark.parametrize(("gradient", "loss"), [(0.0, 1.0), (1e-45, 1e300), (1e15, 1e300), (1.0, -1e300)])
def test_a_step_is_finite_for_any_loss_and_gradient(gradient: float, loss: float) -> None:
    flat = Flat({**PLUS, "weight_decay": 1.0}, {}, initial_weights())
    flat.step({name: torch.full_like(weight, gradient) for name, weight in initial_weights().items()}, loss=loss)
    assert all(math.isfinite(value) for value in flat.scalars["default"].values())
    assert all(vector.isfinite().all() for vector in flat.buffers.values())
    is_still = gradient == 0 or loss < 0
    assert torch.equal(flat.buffers["z"], flat.join(initial_weights())) == is_still


def test_the_norms_average_is_the_authors() -> None:
    """For norms of 1, by hand: e is corrected, and averaged on from as it is then."""
    weights = {name: torch.ones(1, dtype=torch.float64) for name in ("matrix", "vector")}
    norm = 1 / math.sqrt(math.pi / 2) / 2
    flat = Flat({**PLUS, "polyak_beta": 0.5, "eps": 1e-6}, {}, weights)
    # e_1 = 1; e_2 = (e_1/2 + 1/2)/(3/4) = 4/3; e_3 = (2/3 + 1/2)/(7/8) = 4/3; e_4 = (2/3 + 1/2)/(15/16) = 56/45.
    for expected in (1.0, 4 / 3, 4 / 3, 56 / 45):
        flat.step({name: torch.full_like(weight, norm) for name, weight in weights.items()}, loss=1.0)
        assert flat.scalars["default"]["grad_l1_ema"] == pytest.approx(expected)


def test_an_average_that_overflows_stays_finite() -> None:
    flat = Flat({**PLUS, "polyak_beta": 0.999}, {}, initial_weights())
    for gradients in random_gradients(400):
        flat.step(gradients, loss=1.0)
    assert all(math.isfinite(value) for value in flat.scalars["default"].values())
    assert all(vector.isfinite().all() for vector in flat.buffers.values())


@pytest.mark.parametrize("numel", [0, 1, BLOCK - 1, BLOCK, 2 * MIN_SLICE + 17, 3 * MIN_SLICE + BLOCK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_have_the_same_bits_for_any_number_of_threads(numel: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(numel)
    pushed, before, z, x = (torch.randn(numel, generator=generator) for _ in range(4))
    gradients = [Gradient(pushed.to(dtype), 0.5, 3.0), Gradient(pushed.to(dtype), 0.25, 2.0, before)]
    threads = torch.get_num_threads()
    try:
        for gradient in gradients:
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(gradient_sums(gradient, z, x))
            assert found == [found[0]] * 3
            g = gradient.evaluated(torch.float64)
            expected = float(g.abs().sum()), float((g * (z.double() - x.double())).sum())
            assert found[0] == pytest.approx(expected, rel=1e-6, abs=1e-6)
            assert gradient_sums(gradient, z.double(), x.double()) == pytest.approx(expected)
    finally:
        torch.set_num_threads(threads)


def scaled(factor: float) -> dict[str, Tensor]:
    return {name: factor * tensor for name, tensor in TENSORS.items()}


def assert_points(api: Api, twin: AdamCPlus) -> None:
    for point, expected in (("x", twin.x), ("y", twin.y), ("z", twin.z)):
        for name, tensor in expected.items():
            torch.testing.assert_close(api.pull(point)[0][name], tensor.float(), rtol=1e-5, atol=1e-6)


def test_a_push_without_a_loss_is_refused_unread(api: Api, service: ThreadService) -> None:
    api.create(optimizer=PLUS)
    lease = api.lease()
    before = api.state(service)
    answer = api.push(lease, 0)
    assert (answer.status_code, slug(answer)) == (422, "invalid-spec")
    assert "Freestep-Loss" in answer.json()["detail"]
    with begun_push(api, lease, b"") as connection:
        assert b"invalid-spec" in answered(connection)
    assert api.state(service) == before
    assert slug(api.push(lease, 0, Freestep_Loss="inf")) == "malformed-request"
    assert api.push(lease, 0, Freestep_Loss="0.5").json()["step"] == 1


def test_a_push_is_a_step_of_the_paper(api: Api) -> None:
    api.create(optimizer={**PLUS, "weight_decay": 0.5, "sf_beta1_anneal_steps": 4})
    twin, lease = AdamCPlus(TENSORS, weight_decay=0.5, sf_beta1_anneal_steps=4), api.lease()
    for step in range(6):
        gradient = scaled(math.sin(step + 1))
        assert api.push(lease, step, tensors=gradient, Freestep_Loss=str(2.0 - step / 4)).json()["step"] == step + 1
        twin.step(gradient, 2.0 - step / 4)
    assert_points(api, twin)


def test_a_groups_loss_is_the_mean_of_its_pushes(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    """Weighted by samples, as their gradients are; the service restarts in between."""
    service = start_service()
    api = connect(service.url)
    api.create(optimizer=PLUS, aggregation={"policy": "buffered", "batch": 2})
    twin = AdamCPlus(TENSORS)
    api.push(api.lease(), 0, tensors=scaled(1.0), Freestep_Loss="3", Freestep_Samples="1")
    service.stop()
    api = connect(start_service().url, api.run)
    api.push(api.lease(), 0, tensors=scaled(-2.0), Freestep_Loss="1", Freestep_Samples="3")
    twin.step(scaled((1.0 - 6.0) / 4), (3 + 3 * 1) / 4)
    assert_points(api, twin)


def test_a_run_with_sums_has_one_shard(api: Api) -> None:
    answer = api.http.put(api.path(), json=api.spec(optimizer=PLUS, shards=2))
    assert (slug(answer), answer.json()["field"]) == ("invalid-spec", "shards")
    api.create(optimizer=PLUS)
    answer = api.http.post(api.path("/reshard"), json={"shards": 2})
    assert (slug(answer), answer.json()["field"]) == ("invalid-spec", "shards")
    assert (api.status()["shards"], api.status()["epoch"]) == (1, 1)


def test_hyperparameters_of_the_sums_are_not_a_groups_own(api: Api) -> None:
    for name in ("polyak_beta", "sf_beta1", "sf_beta1_max"):
        spec = api.spec(optimizer=PLUS, groups={"own": {name: 0.5}})
        answer = api.http.put(api.path(), json=spec)
        assert (slug(answer), answer.json()["field"]) == ("invalid-spec", f"groups.own.{name}")


def test_a_remote_optimizer_sends_the_loss_of_its_step(service: ThreadService, api: Api) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(8, 1), torch.randn(64, 8)
    targets = inputs.sum(1, keepdim=True)
    found: list[float] = []
    optimizer = RemoteOptimizer(model, url=service.url, run=api.run, algorithm="adamc_schedule_free_plus")
    try:
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step(loss=loss.detach())
            found.append(float(loss.detach()))
        assert found[-1] < 0.05 * found[0]
        with pytest.raises(InvalidSpec, match="Freestep-Loss"):
            optimizer.step()
    finally:
        optimizer.close()
