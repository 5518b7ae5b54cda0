"""Learning-rate schedules against torch's, and averages of the baselines against torch's averaged models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flats import Flat
from freestep.api.hyperparameters import SGD
from freestep.api.schedules import Plateau, Schedule
from freestep_service.optimizers import Scalars
from freestep_service.optimizers.methods.plateau import observe, remaining
from freestep_service.optimizers.methods.schedules import scheduled

STEPS = 500
STEADY = settings(derandomize=True, deadline=None, max_examples=2, suppress_health_check=list(HealthCheck))
LR = 0.3


def schedule(name: str, **members: Any) -> Schedule:
    made: Schedule = TypeAdapter(Schedule).validate_python({"name": name, **members})
    return made


Make = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
TORCH: list[tuple[dict[str, Any], Make]] = [
    ({"name": "constant"}, lambda peer: lr_scheduler.ConstantLR(peer, factor=1)),
    (
        {"name": "linear", "total_steps": 120, "end_factor": 0.2},
        lambda peer: lr_scheduler.LinearLR(peer, start_factor=1, end_factor=0.2, total_iters=120),
    ),
    (
        {"name": "cosine", "total_steps": 300, "end_factor": 0.1},
        lambda peer: lr_scheduler.CosineAnnealingLR(peer, T_max=300, eta_min=0.1 * LR),
    ),
    (
        {"name": "cosine_restarts", "cycle_steps": 50},
        lambda peer: lr_scheduler.CosineAnnealingWarmRestarts(peer, T_0=50),
    ),
    (
        {"name": "cosine_restarts", "cycle_steps": 7, "cycle_growth": 3, "end_factor": 0.05},
        lambda peer: lr_scheduler.CosineAnnealingWarmRestarts(peer, T_0=7, T_mult=3, eta_min=0.05 * LR),
    ),
    ({"name": "step", "step_size": 90}, lambda peer: lr_scheduler.StepLR(peer, step_size=90)),
    ({"name": "step", "step_size": 1, "gamma": 0.97}, lambda peer: lr_scheduler.ExponentialLR(peer, gamma=0.97)),
]


@pytest.mark.parametrize(("members", "make"), TORCH)
def test_a_schedule_equals_torchs(members: dict[str, Any], make: Make) -> None:
    ours = schedule(**members)
    peer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    theirs = make(peer)
    for k in range(300):
        assert scheduled(LR, ours, k) == pytest.approx(peer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        peer.step()
        theirs.step()


MEMBERS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "factor": st.sampled_from([0.0, 0.1, 0.5]),
        "patience": st.integers(0, 4),
        "threshold": st.sampled_from([0.0, 1e-4, 0.1, 1.0, 2.0]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 3),
        "min_lr": st.sampled_from([0.0, 0.001, 0.2]),
    }
)
VALUES = st.lists(st.one_of(st.sampled_from([0.0, 1.0, 0.999, -1.0]), st.floats(-3, 3)), min_size=1, max_size=60)


@settings(STEADY, max_examples=300)
@given(MEMBERS, VALUES)
def test_a_plateau_equals_torchs(members: dict[str, Any], values: list[float]) -> None:
    h = SGD(lr=LR, schedule=Plateau(metric="loss", warmup_steps=3, **members))
    peer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    theirs = lr_scheduler.ReduceLROnPlateau(peer, **members)
    scalars: Scalars = {"k": 7}
    for value in values:
        scalars = observe(h, scalars, "loss", value)
        assert observe(h, scalars, "accuracy", value) is scalars
        theirs.step(value)
        assert remaining(h, scalars) == peer.param_groups[0]["lr"]
        none_yet = math.inf if members["mode"] == "min" else -math.inf
        assert (scalars.get("best", none_yet), scalars["num_bad_epochs"]) == (theirs.best, theirs.num_bad_epochs)
        assert scalars["cooldown_counter"] == theirs.cooldown_counter
        # A state has no others.
        assert all(map(math.isfinite, scalars.values()))


@pytest.mark.parametrize("algorithm", ["sgd", "adamw", "gpa_adamw"])
@pytest.mark.parametrize("averaging", [{}, {"averaging": {"name": "polyak"}}])
def test_a_plateau_is_of_one_group(algorithm: str, averaging: dict[str, Any]) -> None:
    """A group's learning rate falls to a tenth by its metric; the others' stay."""
    if algorithm == "gpa_adamw" and averaging:
        pytest.skip("it is an average itself")
    plateau = {"name": "plateau", "metric": "loss", "patience": 0}
    spec = {"algorithm": algorithm, "lr": 0.5, **averaging}
    weights = {name: torch.zeros(4, dtype=torch.float64) for name in ("matrix", "vector")}
    both = [Flat(spec, {"schedule": plateau}, weights), Flat(spec, {}, weights)]
    for flat in both:
        for metric, value in (("loss", 1.0), ("other", 2.0), ("loss", 2.0)):
            flat.observe(metric, value)
        flat.step({name: torch.ones(4, dtype=torch.float64) for name in weights})
    reduced, plain = (flat.point("z") for flat in both)
    torch.testing.assert_close(reduced["matrix"], plain["matrix"], rtol=0, atol=0)
    torch.testing.assert_close(reduced["vector"], plain["vector"] / 10)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_stays_at_its_end(name: str) -> None:
    ours = schedule(name, total_steps=10, end_factor=0.25)
    assert [scheduled(LR, ours, k) for k in (10, 11, 2**53)] == pytest.approx([0.25 * LR] * 3)
    assert scheduled(LR, ours, 9) > 0.25 * LR


def test_inverse_sqrt_equals_the_transformers() -> None:
    """arXiv 1706.03762, equation 3, scaled to reach the learning rate at the end of the warmup."""
    ours = schedule("inverse_sqrt", warmup_steps=40)
    for k in range(300):
        expected = LR * 40**0.5 * min((k + 1) ** -0.5, (k + 1) * 40**-1.5)
        assert scheduled(LR, ours, k) == pytest.approx(expected)
    assert scheduled(LR, schedule("inverse_sqrt"), 3) == LR / 2


@pytest.mark.parametrize(("members", "_"), TORCH)
def test_a_schedule_begins_when_the_warmup_ends(members: dict[str, Any], _: Make) -> None:
    later = {"total_steps": members["total_steps"] + 30} if "total_steps" in members else {}
    warm, cold = schedule(**{**members, **later}, warmup_steps=30), schedule(**members)
    assert [scheduled(LR, warm, k) for k in range(30)] == pytest.approx([LR * (k + 1) / 30 for k in range(30)])
    assert [scheduled(LR, warm, k + 30) for k in range(200)] == [scheduled(LR, cold, k) for k in range(200)]


def test_growing_cycles_are_found_quickly() -> None:
    ours = schedule("cosine_restarts", cycle_steps=1, cycle_growth=2)
    assert scheduled(LR, ours, 2**53 - 1) == LR
    assert scheduled(LR, ours, 2**53 - 2) == pytest.approx(0, abs=1e-12)


AVERAGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": "polyak"}, {}),
    ({"name": "polyak", "start_step": 100}, {}),
    ({"name": "ema", "decay": 0.99}, {"multi_avg_fn": get_ema_multi_avg_fn(0.99)}),
    ({"name": "ema", "decay": 0.9, "start_step": 3}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}),
]
BASELINES: dict[str, tuple[type[torch.optim.Optimizer], st.SearchStrategy[dict[str, Any]]]] = {
    "sgd": (
        torch.optim.SGD,
        st.fixed_dictionaries(
            {
                "lr": st.sampled_from([0.01, 0.1]),
                "momentum": st.sampled_from([0.0, 0.9]),
                "dampening": st.sampled_from([0.0, 0.3]),
                "weight_decay": st.sampled_from([0.0, 0.05]),
            }
        ),
    ),
    "adamw": (
        torch.optim.AdamW,
        st.fixed_dictionaries(
            {
                "lr": st.sampled_from([0.003, 0.02]),
                "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.95), (0.8, 0.99)]),
                "eps": st.sampled_from([1e-8, 1e-5]),
                "weight_decay": st.sampled_from([0.0, 0.1]),
            }
        ),
    ),
}


class Model(nn.Module):
    """Weights of 200 elements."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(200, generator=generator, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize(("averaging", "options"), AVERAGES)
@pytest.mark.parametrize("algorithm", BASELINES)
def test_x_equals_torchs_averaged_model(algorithm: str, averaging: dict[str, Any], options: dict[str, Any]) -> None:
    """For a baseline with a schedule: in fp64 within rounding, in fp32 within torch's own error."""
    make, hyperparameters = BASELINES[algorithm]

    @STEADY
    @given(hyperparameters, st.sampled_from(TORCH[1:6]), st.sampled_from([torch.float64, torch.float32]))
    def compared(chosen: dict[str, Any], follows: tuple[dict[str, Any], Make], dtype: torch.dtype) -> None:
        members, _ = follows
        model = Model(dtype)
        flat = Flat(
            {"algorithm": algorithm, **chosen, "schedule": members, "averaging": averaging},
            {},
            {"w": model.w.detach().clone()},
        )
        peer = make([model.w], **chosen)
        theirs = lr_scheduler.LambdaLR(peer, lambda k: scheduled(1.0, schedule(**members), k))
        average = AveragedModel(model, **options)
        generator = torch.Generator().manual_seed(1)
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
        for k in range(STEPS):
            gradient = torch.randn(200, generator=generator, dtype=torch.float64).to(dtype)
            model.w.grad = gradient.clone()
            peer.step()
            theirs.step()
            flat.step({"w": gradient})
            if k >= averaging.get("start_step", 0):
                average.update_parameters(model)
            if k in (0, 2, 3, 4, 99, STEPS - 1):
                expected = average.module.w if k >= averaging.get("start_step", 0) else model.w
                torch.testing.assert_close(flat.point("x")["w"], expected.detach(), **tolerance)
                for point in "yz":
                    torch.testing.assert_close(flat.point(point)["w"], model.w.detach(), **tolerance)

    compared()


def test_groups_may_have_different_averages() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(5, generator=generator, dtype=torch.float64) for name in ("matrix", "vector")}
    spec = {"algorithm": "sgd", "lr": 0.1, "averaging": {"name": "polyak"}}
    flat = Flat(spec, {"averaging": {"name": "ema", "decay": 0.5}}, weights)
    ys = []
    for _ in range(3):
        flat.step({name: torch.ones(5, dtype=torch.float64) for name in weights})
        ys.append({name: tensor.clone() for name, tensor in flat.point("y").items()})
    x = flat.point("x")
    torch.testing.assert_close(x["matrix"], (ys[0]["matrix"] + ys[1]["matrix"] + ys[2]["matrix"]) / 3)
    torch.testing.assert_close(x["vector"], (ys[0]["vector"] + ys[1]["vector"]) / 4 + ys[2]["vector"] / 2)
