"""The named policies, and what staleness leaves of a step."""

from __future__ import annotations

from typing import Any

import pytest

from freestep.api.models import AggregationSpec
from freestep_service.domain.aggregation import Policy, damping, lateness


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
    ],
)
def test_a_named_policy_is_values_of_one_mechanism(spec: dict[str, Any], policy: Policy) -> None:
    assert Policy.of(AggregationSpec(**spec)) == policy


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
