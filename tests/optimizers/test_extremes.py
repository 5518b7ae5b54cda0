"""Extreme hyperparameters: every spec that is accepted can take a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

from flats import Flat
from freestep.api import bases
from freestep.api.hyperparameters import ALGORITHMS
from freestep.api.validation import kinds_of

JUST_BELOW_1 = math.nextafter(1, 0)
LAST = 2**53 - 1
EXTREMES: dict[str, tuple[Any, ...]] = {
    "lr": (0.0, 5e-324, 1e12),
    "weight_decay": (0.0, 1e12),
    "weight_decay_at_y": (0.0, 1e12),
    "dampening": (0.0, 1e12),
    "eps": (1e-30, 1e12),
    "r": (0.0, 10.0),
    "weight_lr_power": (0.0, 10.0),
    "averaging_constant": (1e12,),
    "momentum": (1e-6, JUST_BELOW_1),
    "inner_momentum": (0.0, JUST_BELOW_1),
    "betas": ((1e-6, 1e-6), (1e-6, JUST_BELOW_1), (JUST_BELOW_1, 1e-6), (JUST_BELOW_1, JUST_BELOW_1)),
    "mu_x": (0.0, JUST_BELOW_1),
    "mu_y": (1e-6, JUST_BELOW_1),
    "warmup_steps": (0, LAST),
    "schedule": (
        {"warmup_steps": LAST},
        {"name": "cosine", "total_steps": 1},
        {"name": "linear", "warmup_steps": LAST - 1, "total_steps": LAST},
        {"name": "cosine_restarts", "cycle_steps": 1, "cycle_growth": 1000},
        {"name": "step", "step_size": 1, "gamma": 0},
        {"name": "step", "step_size": 1, "gamma": JUST_BELOW_1},
        {"name": "inverse_sqrt", "warmup_steps": LAST},
    ),
    "averaging": ({"name": "none"}, {"name": "polyak", "start_step": LAST}, {"name": "ema", "decay": JUST_BELOW_1}),
    "nesterov": (False,),
    "decay_at_z": (False, True),
    "silent_sgd_phase": (False, True),
    # Of the wrapper's bases.
    "alpha": (0.0, JUST_BELOW_1),
    "centered": (False, True),
    "amsgrad": (False, True),
    "decoupled_weight_decay": (False, True),
    "lr_decay": (0.0, 1e12),
    "initial_accumulator_value": (0.0, 1e12),
    "momentum_decay": (0.0, 1e12),
    "adjust_lr_fn": (None, "match_rms_adamw"),
    "beta2": (0.0, JUST_BELOW_1),
    "ns_steps": (1, 99),
    "etas": ((1e-300, 1e12), (JUST_BELOW_1, math.nextafter(1, 2))),
    "step_sizes": ((0.0, 0.0), (0.0, 1e12), (1e12, 1e12)),
}


def choices(model: Any, **chosen: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Every combination of the extreme values of a model's members."""
    known = {**EXTREMES, **chosen}
    names = [name for name in model.model_fields if name in known]
    for values in itertools.product(*(known[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def assert_steps(optimizer: dict[str, Any], shape: tuple[int, ...] = (2,)) -> None:
    """A step must not fail, and a weight of 0 with gradient 0 must not become NaN."""
    flat = Flat(optimizer, {}, {"w": torch.tensor([0.0, 1.0]).view(shape)})
    for k in (0, LAST - 1):
        flat.scalars["default"] = {**flat.scalars["default"], "k": k}
        flat.step({"w": torch.tensor([0.0, 1e3]).view(shape)})
        assert all(map(math.isfinite, flat.scalars["default"].values()))
        assert flat.point("x")["w"].flatten()[0] == 0


@pytest.mark.parametrize("algorithm", [algorithm for algorithm in ALGORITHMS if algorithm != "schedule_free_wrapper"])
def test_no_hyperparameter_that_a_spec_allows_makes_a_step_fail(algorithm: str) -> None:
    for chosen in choices(ALGORITHMS[algorithm]):
        assert_steps({"algorithm": algorithm, **chosen})


@pytest.mark.parametrize("base", kinds_of("algorithm", get_args(bases.Base)[0]))
def test_no_hyperparameter_of_a_base_makes_a_step_fail(base: str) -> None:
    wrapper = {"algorithm": "schedule_free_wrapper", "momentum": JUST_BELOW_1, "weight_decay_at_y": 1e12, "r": 10.0}
    kind = kinds_of("algorithm", get_args(bases.Base)[0])[base]
    # Momentum of 0 is another rule.
    for chosen in choices(kind, momentum=(0.0, 1e-6, JUST_BELOW_1)):
        shape = (1, 2) if issubclass(kind, bases.MatrixBase) else (2,)
        assert_steps({**wrapper, "base": {"algorithm": base, **chosen}}, shape)


def test_no_hyperparameter_of_the_wrapper_makes_a_step_fail() -> None:
    for chosen in choices(ALGORITHMS["schedule_free_wrapper"]):
        assert_steps({"algorithm": "schedule_free_wrapper", "base": {"algorithm": "adam", "lr": 1e12}, **chosen})
