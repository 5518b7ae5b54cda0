"""A spec for every rule that the service has, by a name of its own."""

from __future__ import annotations

from typing import Any

from freestep.api.hyperparameters import ALGORITHMS, OptimizerSpec

BASES: dict[str, dict[str, Any]] = {
    "sgd": {"algorithm": "sgd", "lr": 0.05},
    "sgd-momentum": {"algorithm": "sgd", "lr": 0.05, "momentum": 0.9, "dampening": 0.2},
    "sgd-nesterov": {"algorithm": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "rmsprop": {"algorithm": "rmsprop", "lr": 0.01},
    "rmsprop-momentum": {"algorithm": "rmsprop", "lr": 0.01, "momentum": 0.8},
    "rmsprop-centered": {"algorithm": "rmsprop", "lr": 0.01, "centered": True},
    "rmsprop-centered-momentum": {"algorithm": "rmsprop", "lr": 0.01, "centered": True, "momentum": 0.8},
    "adagrad": {"algorithm": "adagrad", "lr": 0.05, "lr_decay": 0.01, "initial_accumulator_value": 0.1},
    "adam": {"algorithm": "adam", "lr": 0.01},
    "adam-amsgrad": {"algorithm": "adam", "lr": 0.01, "amsgrad": True},
    "adamw": {"algorithm": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "adamw-amsgrad": {"algorithm": "adamw", "lr": 0.01, "amsgrad": True},
    "nadam": {"algorithm": "nadam", "lr": 0.01},
    "radam": {"algorithm": "radam", "lr": 0.01},
    "adamax": {"algorithm": "adamax", "lr": 0.01},
    "rprop": {"algorithm": "rprop", "lr": 0.01},
}

PLAIN: dict[str, dict[str, Any]] = {
    name: {"algorithm": name, "lr": 0.01}
    for name in (
        "sgd_schedule_free",
        "adamw_schedule_free",
        "radam_schedule_free",
        "gpa_adamw",
        "gpa_sgd",
        "sgd",
        "adamw",
    )
}
"""Algorithms with a learning rate and else their defaults."""

FORMS: dict[str, dict[str, Any]] = {
    **PLAIN,
    "adamw_schedule_free-inner_momentum": {
        **PLAIN["adamw_schedule_free"],
        "inner_momentum": 0.9,
        "decay_at_z": True,
        "averaging_constant": 20.0,
    },
    "diloco": {"algorithm": "diloco", "lr": 0.05},
    "diloco-delayed": {"algorithm": "diloco", "lr": 0.05, "momentum_period": 3, "momentum_activation": 0.2},
    "sgd-polyak": {**PLAIN["sgd"], "momentum": 0.9, "averaging": {"name": "polyak", "start_step": 2}},
    "adamw-ema": {**PLAIN["adamw"], "averaging": {"name": "ema", "decay": 0.9}},
    **{
        f"schedule_free_wrapper-{name}": {
            "algorithm": "schedule_free_wrapper",
            "base": base,
            "weight_decay_at_y": 0.05,
        }
        for name, base in BASES.items()
    },
}


def hyperparameters(form: str) -> OptimizerSpec:
    return ALGORITHMS[FORMS[form]["algorithm"]].model_validate(FORMS[form])


def own(form: str, lr: float, weight_decay: float) -> dict[str, Any]:
    """What a param group of a form, or algorithm, says to have a learning rate and a weight decay of its own.

    Or a momentum, where there is no weight decay.
    """
    if form.startswith("schedule_free_wrapper"):
        return {"base": {"lr": lr}, "weight_decay_at_y": weight_decay}
    if form.startswith("diloco"):
        return {"lr": lr, "momentum": 0.9 - weight_decay}
    return {"lr": lr, "weight_decay": weight_decay}
