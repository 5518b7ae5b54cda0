"""The named policies, and what staleness leaves of a step."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from freestep.api.models import AggregationSpec, RunSpec
from freestep_service.domain.aggregation import Policy, accepted_encodings, damping, lateness


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ({"policy": "async"}, Policy("1", "none", False)),
        ({"policy": "async", "max_staleness": 100}, Policy("1", "100", False)),
        ({"policy": "ringmaster"}, Policy("1", "adaptive", False)),
        ({"policy": "ringmaster", "max_staleness": 3}, Policy("1", "3", False)),
        ({"policy": "sync"}, Policy("live", "0", True)),
        ({"policy": "quorum", "batch": 3}, Policy("3", "0", True)),
        ({"policy": "buffered", "batch": 2}, Policy("2", "none", False)),
        ({"policy": "rennala", "batch": 4}, Policy("4", "0", False)),
        ({"policy": "ssp", "slack": 5}, Policy("1", "none", False, "5")),
        ({"policy": "async", "robust": "clip"}, Policy("1", "none", False, "", '{"outlier": 10.0, "clip": 1.0}')),
        (
            {"policy": "buffered", "batch": 5, "robust": "krum", "f": 1, "ban_after": 3},
            Policy("5", "none", True, "", '{"outlier": 10.0, "ban_after": 3}', 5),
        ),
        (
            {"policy": "sync", "max_batch": 4, "robust": "coordinate_median", "outlier_factor": 3.0},
            Policy("live", "0", True, "", '{"outlier": 3.0, "max_batch": 4}', 4),
        ),
        (
            {"policy": "async", "batch": 3, "robust": "trimmed_mean", "beta": 0.2},
            Policy("3", "none", True, "", '{"outlier": 10.0}', 3),
        ),
    ],
)
def test_a_named_policy_is_values_of_one_mechanism(spec: dict[str, Any], policy: Policy) -> None:
    assert Policy.of(AggregationSpec(**spec)) == policy


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"robust": "mean"}, "robust"),
        ({"robust": "trimmed_mean", "beta": 0.2}, "robust"),
        ({"policy": "ssp", "slack": 1, "robust": "coordinate_median"}, "robust"),
        ({"policy": "async", "batch": 1, "robust": "krum", "f": 1}, "robust"),
        ({"clip_factor": 2.0}, "clip_factor"),
        ({"robust": "clip", "clip_factor": 0.0}, "clip_factor"),
        ({"robust": "clip", "beta": 0.2}, "beta"),
        ({"robust": "clip", "max_batch": 5}, "max_batch"),
        ({"policy": "sync", "robust": "clip", "max_batch": 5}, "max_batch"),
        ({"outlier_factor": 5.0}, "outlier_factor"),
        ({"robust": "clip", "outlier_factor": 1.0}, "outlier_factor"),
        ({"ban_after": 3}, "ban_after"),
        ({"robust": "clip", "ban_after": 0}, "ban_after"),
        ({"policy": "quorum", "batch": 5, "robust": "trimmed_mean"}, "beta"),
        ({"policy": "quorum", "batch": 5, "robust": "trimmed_mean", "beta": 0.5}, "beta"),
        ({"policy": "quorum", "batch": 2, "robust": "coordinate_median"}, "batch"),
        ({"policy": "quorum", "batch": 257, "robust": "coordinate_median"}, "batch"),
        ({"policy": "quorum", "batch": 5, "robust": "krum"}, "f"),
        ({"policy": "quorum", "batch": 4, "robust": "krum", "f": 1}, "batch"),
        ({"policy": "quorum", "batch": 5, "robust": "krum", "f": 1, "m": 5}, "m"),
        ({"policy": "quorum", "batch": 5, "robust": "coordinate_median", "max_batch": 5}, "max_batch"),
        ({"policy": "sync", "robust": "coordinate_median"}, "max_batch"),
        ({"policy": "sync", "batch": 5, "robust": "coordinate_median", "max_batch": 5}, "max_batch"),
        ({"policy": "sync", "robust": "krum", "f": 2, "max_batch": 6}, "max_batch"),
    ],
)
def test_what_a_robust_rule_cannot_have_is_refused_by_name(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        AggregationSpec(**spec)
    assert [error["loc"] for error in refused.value.errors()] == [(field,)]


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"aggregation": {"policy": "quorum", "batch": 256, "robust": "krum", "f": 1}, "shards": 33}, ("shards",)),
        (
            {"aggregation": {"robust": "clip"}, "optimizer": {"algorithm": "adamc_schedule_free_plus"}},
            ("aggregation", "robust"),
        ),
    ],
)
def test_what_a_run_under_a_robust_rule_cannot_be_is_refused(members: dict[str, Any], field: tuple[str, ...]) -> None:
    document = {"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [2]}], **members}
    with pytest.raises(ValidationError) as refused:
        RunSpec.model_validate(document)
    assert [error["loc"] for error in refused.value.errors()] == [field]


@pytest.mark.parametrize(("batch", "most"), [(256, 32), (128, 129), (91, 256), (5, 256)])
def test_the_distances_between_pushes_bound_the_number_of_shards(batch: int, most: int) -> None:
    document = {
        "optimizer": {"algorithm": "sgd"},
        "parameters": [{"name": "w", "shape": [2]}],
        "aggregation": {"policy": "quorum", "batch": batch, "robust": "krum", "f": 1},
    }
    spec = RunSpec.model_validate({**document, "shards": most})
    assert spec.most_shards == most
    assert most * batch * (batch - 1) // 2 <= 2**20
    document["aggregation"] = {"policy": "quorum", "batch": batch, "robust": "coordinate_median"}
    assert RunSpec.model_validate({**document, "shards": 256}).most_shards == 256


def test_rules_by_coordinate_take_no_top_k() -> None:
    quorum: dict[str, Any] = {"policy": "quorum", "batch": 5}
    median = AggregationSpec(robust="coordinate_median", **quorum)
    assert accepted_encodings(median) == ("dense", "int8")
    assert accepted_encodings(AggregationSpec(robust="krum", f=1, **quorum)) == ("dense", "int8", "topk")
    assert accepted_encodings(AggregationSpec()) == ("dense", "int8", "topk")


@pytest.mark.parametrize(("batch", "groups", "concurrency"), [("1", False, 1), ("3", True, 3), ("9", True, 4)])
def test_a_batch_says_what_memory_it_takes(batch: str, groups: bool, concurrency: int) -> None:
    policy = Policy(batch, "none", False)
    assert (policy.groups, policy.concurrency) == (groups, concurrency)


def test_a_batch_of_all_live_workers_takes_memory_for_some() -> None:
    assert (Policy("live", "0", True).groups, Policy("live", "0", True).concurrency) == (True, 4)


@pytest.mark.parametrize(
    ("kind", "staleness", "live", "left"),
    [
        ("none", 100, 1, 1.0),
        ("delay_adaptive", 0, 0, 1.0),
        ("delay_adaptive", 4, 4, 1.0),
        ("delay_adaptive", 8, 4, 0.5),
        ("delay_adaptive", 8, 0, 0.125),
        ("inverse_sqrt", 0, 4, 1.0),
        ("inverse_sqrt", 3, 4, 0.5),
    ],
)
def test_staleness_damps_the_learning_rate(kind: Any, staleness: int, live: int, left: float) -> None:
    spec = AggregationSpec(policy="async", staleness_damping=kind)
    assert damping(spec, staleness, live) == left


def test_a_push_is_late_above_the_threshold() -> None:
    assert lateness(AggregationSpec(policy="async"), 100) == 0
    spec = AggregationSpec(policy="async", staleness_damping="fadas", staleness_threshold=3)
    assert [lateness(spec, staleness) for staleness in (0, 3, 4)] == [0, 0, 4]
