"""Hypothesis strategies for the specs of small runs: an algorithm, a policy, some parameters in two groups."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from forms import own
from freestep.api.delay import Ahead
from freestep.api.hyperparameters import AdamWScheduleFree, ScheduleFree
from freestep.api.models import RunSpec

__all__ = ["HYPERPARAMETERS", "POLICIES", "run_specs", "wishes_for"]

HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "sgd_schedule_free": {"lr": 0.3, "weight_decay": 0.01, "warmup_steps": 3, "r": 1.0},
    "adamw_schedule_free": {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 2},
    "radam_schedule_free": {"lr": 0.05, "weight_decay": 0.1},
    "schedule_free_wrapper": {
        "base": {"algorithm": "nadam", "lr": 0.05, "weight_decay": 0.1},
        "weight_decay_at_y": 0.1,
        "averaging_constant": 20.0,
    },
    "gpa_adamw": {"lr": 0.05, "schedule": {"name": "linear", "total_steps": 5}},
    "gpa_sgd": {"lr": 0.5},
    "sgd": {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "schedule": {"name": "cosine", "total_steps": 6},
        "averaging": {"name": "polyak", "start_step": 1},
    },
    "adamw": {"lr": 0.05, "schedule": {"name": "constant", "warmup_steps": 2}},
    "diloco": {"momentum_period": 2, "momentum_activation": 0.3},
}
"""Algorithms that a run of several shards may have, with hyperparameters that show within a few steps."""
POLICIES: dict[str, dict[str, Any]] = {
    "async": {},
    "ringmaster": {"max_staleness": 2},
    "sync": {},
    "quorum": {"batch": 2},
    "buffered": {"batch": 3},
    "rennala": {"batch": 2},
    "ssp": {"slack": 30},
}
"""Policies, and what their specs say beside the name."""
_ROBUST: list[dict[str, Any]] = [{}, {}, {"robust": "clip", "clip_factor": 1.0, "outlier_factor": 1.2}]
"""Rules for any policy that a run of several shards may have."""
_COMPARING: list[dict[str, Any]] = [
    {"robust": "trimmed_mean", "beta": 0.2, "outlier_factor": 1.2},
    {"robust": "coordinate_median"},
]
"""Rules for policies whose updates are made of several pushes."""
_KRUM: list[dict[str, Any]] = [{"robust": "krum", "f": 1}, {"robust": "krum", "f": 1, "m": 2}]
"""Rules that take two pushes more than these."""
_GATHERING = ("sync", "quorum", "buffered", "rennala")
"""Such policies."""

_SHAPES = st.one_of(
    st.just(()),
    st.just((0, 3)),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(1, 9)),
    st.tuples(st.just(1), st.integers(200, 900)),
)


@st.composite
def run_specs(draw: st.DrawFn, algorithm: str, policy: str, *, most_pushes: int = 5) -> dict[str, Any]:
    """Specs as clients send them, of one to five parameters. most_pushes: of an update that a rule compares."""
    optimizer = {"algorithm": algorithm, **HYPERPARAMETERS[algorithm]}
    if draw(st.booleans()):
        optimizer["max_grad_norm"] = draw(st.sampled_from([0.5, 5.0]))
    if "schedule_free" in algorithm:
        optimizer["delay_correction"] = {"name": draw(st.sampled_from(["none", "auto", "ahead"]))}
    damping = draw(st.sampled_from(["none", "delay_adaptive", "inverse_sqrt", "fadas"]))
    threshold = {"staleness_threshold": 1} if damping == "fadas" else {}
    comparing = [*_COMPARING, *(_KRUM if most_pushes >= 5 else [])] if policy in _GATHERING else []
    robust = draw(st.sampled_from([*_ROBUST, *comparing]))
    own_values = POLICIES[policy]
    if robust in comparing:
        own_values = {"max_batch" if policy == "sync" else "batch": 5 if robust in _KRUM else 3}
    return {
        "optimizer": optimizer,
        "aggregation": {"policy": policy, "staleness_damping": damping, **threshold, **own_values, **robust},
        "parameters": [
            {"name": f"t{number}", "shape": list(shape), "group": draw(st.sampled_from(["default", "own"]))}
            for number, shape in enumerate(draw(st.lists(_SHAPES, min_size=1, max_size=5)))
        ],
        "groups": {"own": own(algorithm, lr=0.02, weight_decay=0.0)},
        "durability": "none",
    }


def wishes_for(spec: RunSpec) -> list[dict[str, Any]]:
    """Changes that a run of this spec may be asked for."""
    rate = {"base": {"lr": 0.2}} if spec.optimizer.algorithm == "schedule_free_wrapper" else {"lr": 0.2}
    wishes: list[dict[str, Any]] = [
        {"optimizer": rate},
        {"optimizer": {**rate, "max_grad_norm": 0.7}},
        {"optimizer": {"max_grad_norm": None}},
        {"groups": {"own": rate}},
        {"aggregation": {"staleness_damping": "inverse_sqrt", "staleness_threshold": None}},
        {"aggregation": {"max_staleness": 3}},
    ]
    if isinstance(spec.optimizer, ScheduleFree):
        wishes += [{"optimizer": {"r": 2.0}}]
        if not isinstance(spec.optimizer.delay_correction, Ahead):
            wishes += [{"optimizer": {"delay_correction": {"name": "auto"}}}]
    if isinstance(spec.optimizer, AdamWScheduleFree):
        wishes += [{"optimizer": {"betas": [0.8, 0.9]}}, {"optimizer": {"weight_decay": 0.0, "warmup_steps": 0}}]
    if not spec.aggregation.compares:
        policies = [{"policy": name, **own} for name, own in POLICIES.items()]
        wishes += [
            {"aggregation": {**policy, "robust": "none", "clip_factor": None, "outlier_factor": None}}
            for policy in policies
        ]
        wishes += [{"aggregation": {"robust": "clip", "clip_factor": 0.5}}]
    return wishes
