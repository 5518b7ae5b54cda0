"""x and y equal the `schedulefree` package's over 500 steps, with a checkpoint in between."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flats import GROUPS, Flat, initial_weights, random_gradients
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.storage.media import open_storage

STEPS, CHECKPOINT = 500, 230
BOUNDS = {"rtol": 1e-5, "atol": 1e-7}
STEADY = settings(
    derandomize=True,
    deadline=None,
    max_examples=4,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

Make = Callable[[list[dict[str, Any]], dict[str, Any]], Any]

betas = st.tuples(st.sampled_from([0.8, 0.9, 0.98]), st.sampled_from([0.95, 0.999]))
decays = st.sampled_from([0.0, 0.05])
warmups = st.sampled_from([0, 40])
averages = {"r": st.sampled_from([0.0, 1.0]), "weight_lr_power": st.sampled_from([0.0, 2.0])}


def sgd(groups: list[dict[str, Any]], h: dict[str, Any]) -> Any:
    return schedulefree.SGDScheduleFree(groups, **h)


def adamw(groups: list[dict[str, Any]], h: dict[str, Any]) -> Any:
    return schedulefree.AdamWScheduleFreeReference(groups, **h)


def radam(groups: list[dict[str, Any]], h: dict[str, Any]) -> Any:
    return schedulefree.RAdamScheduleFree(groups, **h)


def wrapper(groups: list[dict[str, Any]], h: dict[str, Any]) -> Any:
    """Over SGD, one of the bases that the package's wrapper works with."""
    base = {name: value for name, value in h["base"].items() if name != "algorithm"}
    own = [{**group, **group.get("base", {})} for group in groups]
    return schedulefree.ScheduleFreeWrapper(
        torch.optim.SGD([{name: group[name] for name in group if name != "base"} for group in own], **base),
        **{name: value for name, value in h.items() if name != "base"},
    )


METHODS: dict[str, tuple[Make, dict[str, st.SearchStrategy[Any]], dict[str, Any]]] = {
    "sgd_schedule_free": (
        sgd,
        {
            "lr": st.sampled_from([0.01, 0.05]),
            "momentum": st.sampled_from([0.8, 0.9, 0.98]),
            "weight_decay": decays,
            "warmup_steps": warmups,
            **averages,
        },
        {"lr": 0.003, "weight_decay": 0.02},
    ),
    "adamw_schedule_free": (
        adamw,
        {
            "lr": st.sampled_from([0.002, 0.01]),
            "betas": betas,
            "eps": st.sampled_from([1e-8, 1e-6]),
            "weight_decay": decays,
            "warmup_steps": warmups,
            "decay_at_z": st.booleans(),
            **averages,
        },
        {"lr": 0.003, "weight_decay": 0.02},
    ),
    "radam_schedule_free": (
        radam,
        {
            "lr": st.sampled_from([0.002, 0.01]),
            "betas": betas,
            "weight_decay": decays,
            "silent_sgd_phase": st.booleans(),
            **averages,
        },
        {"lr": 0.003, "weight_decay": 0.02},
    ),
    "schedule_free_wrapper": (
        wrapper,
        {
            "base": st.fixed_dictionaries(
                {
                    "algorithm": st.just("sgd"),
                    "lr": st.sampled_from([0.01, 0.05]),
                    "momentum": st.sampled_from([0.0, 0.9]),
                    "weight_decay": decays,
                }
            ),
            "momentum": st.sampled_from([0.8, 0.9]),
            "weight_decay_at_y": decays,
            **averages,
        },
        {"base": {"lr": 0.003, "weight_decay": 0.02}},
    ),
}
"""By algorithm: the package's optimizer, its hyperparameters, and those of the second param group."""


class Package:
    """The package's optimizer over the tensors, in a dtype."""

    def __init__(self, make: Make, h: dict[str, Any], second: dict[str, Any], dtype: torch.dtype) -> None:
        self.parameters = {name: nn.Parameter(weight.to(dtype)) for name, weight in weights().items()}
        groups: dict[str, list[nn.Parameter]] = {"default": [], "second": []}
        for name, parameter in self.parameters.items():
            groups[GROUPS[name]].append(parameter)
        self.optimizer = make([{"params": groups["default"]}, {"params": groups["second"], **second}], h)
        self.optimizer.train()

    def step(self, gradients: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            # A copy, since the package adds weight decay to it.
            parameter.grad = gradients[name].to(parameter.dtype, copy=True)
        self.optimizer.step()

    def point(self, name: str) -> Tensor:
        if name == "x":
            self.optimizer.eval()
        flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters.values()])
        if name == "x":
            self.optimizer.train()
        return flat


def weights() -> dict[str, Tensor]:
    """Without the scalar, which the package's wrapper does not support."""
    return {name: weight for name, weight in initial_weights().items() if name != "scalar"}


def document(algorithm: str, h: dict[str, Any], second: dict[str, Any]) -> RunSpec:
    return RunSpec.model_validate(
        {
            "optimizer": {"algorithm": algorithm, **h},
            "aggregation": {"policy": "async"},
            "parameters": [{"name": name, "shape": w.shape, "group": GROUPS[name]} for name, w in weights().items()],
            "groups": {"second": second},
        }
    )


def through_a_checkpoint(made: Shard, spec: RunSpec) -> Shard:
    """Another shard, loaded from this one's checkpoint."""
    checkpoints = Checkpoints(open_storage(f"memory://{uuid.uuid4()}"), "run", keep=1)
    whole = 0, made.manifest.numel
    copy = made.copy_state()
    checkpoints.write(copy, *whole, made.manifest.numel, {})
    checkpoint_id = id_of(copy)
    checkpoints.complete(checkpoint_id)
    other = Shard(spec, made.manifest, made.device)
    other.load(checkpoints.load(checkpoint_id, *whole)[0], epoch=2)
    return other


@pytest.mark.parametrize("algorithm", METHODS)
def test_x_and_y_equal_the_packages(algorithm: str) -> None:
    """The rule in fp64 within the bounds of the package's in fp64; a shard's fp32 within them, or twice the package's.

    Over 500 steps the package's own fp32 leaves the bounds, by which its fp64 is then the truth.
    """
    make, strategies, second = METHODS[algorithm]

    @STEADY
    @given(st.fixed_dictionaries(strategies))
    def compared(h: dict[str, Any]) -> None:
        spec = document(algorithm, h, second)
        exact = Flat({"algorithm": algorithm, **h}, second, {n: w.double() for n, w in weights().items()})
        made = Shard(spec, Manifest.of(spec), torch.device("cpu"))
        made.initialize(exact.join(weights()), epoch=1)
        truth, peer = (Package(make, h, second, dtype) for dtype in (torch.float64, torch.float32))
        for number, gradients in enumerate(random_gradients(STEPS), start=1):
            truth.step(gradients)
            peer.step(gradients)
            exact.step({name: gradient.double() for name, gradient in gradients.items()})
            made.apply(Entry(made.seq + 1, made.epoch, advance=True, gradient=exact.join(gradients)))
            if number == CHECKPOINT:
                made = through_a_checkpoint(made, spec)
        for point in ("x", "y"):
            expected, out = truth.point(point), torch.empty(made.manifest.numel)
            made.copy_point(point, out)  # type: ignore[arg-type]
            torch.testing.assert_close(exact.join(exact.point(point)), expected, **BOUNDS)
            own = (peer.point(point).double() - expected).abs().max()
            allowed = torch.clamp(BOUNDS["atol"] + BOUNDS["rtol"] * expected.abs(), min=float(2 * own))
            assert ((out.double() - expected).abs() <= allowed).all()

    compared()
