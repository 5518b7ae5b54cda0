"""The staleness that is expected of gradients: by the workers that are live, and by what was seen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from freestep.api.models import RunSpec
from freestep_service.domain.delay import Expectation


def expectation(correction: dict[str, Any] | None, **aggregation: Any) -> Expectation:
    optimizer = {"algorithm": "sgd_schedule_free"} | ({"delay_correction": correction} if correction else {})
    spec = {"optimizer": optimizer, "aggregation": aggregation, "parameters": [{"name": "w", "shape": [1]}]}
    return Expectation.of(RunSpec.model_validate(spec))


AUTO = {"name": "auto"}
AHEAD = {"name": "ahead"}
LIVE = [
    ({"policy": "async"}, 8),
    ({"policy": "ringmaster"}, 8),
    ({"policy": "ringmaster", "max_staleness": 3}, 3),
    ({"policy": "buffered", "batch": 3}, 3),
    ({"policy": "sync"}, 0),
    ({"policy": "quorum", "batch": 2}, 0),
    ({"policy": "rennala", "batch": 2}, 0),
]


@pytest.mark.parametrize("correction", [AUTO, AHEAD], ids=["auto", "ahead"])
@pytest.mark.parametrize(("aggregation", "steps"), LIVE)
def test_nine_workers_raise_the_expected_staleness_at_once(
    aggregation: dict[str, Any], steps: int, correction: dict[str, Any]
) -> None:
    assert expectation(correction, **aggregation).after(0.0, 0, 9) == steps
    assert expectation(correction, **aggregation).after(0.0, 0, 1) == 0


@pytest.mark.parametrize(("aggregation", "steps"), LIVE)
def test_policies_that_admit_stale_gradients_default_to_auto(aggregation: dict[str, Any], steps: int) -> None:
    assert expectation(None, **aggregation).after(0.0, 0, 9) == steps
    assert expectation(None, **aggregation | {"max_staleness": 0}).after(0.0, 0, 9) == 0


@pytest.mark.parametrize(
    ("optimizer", "group"),
    [
        ({"algorithm": "sgd_schedule_free", "momentum": 0.6}, {}),
        ({"algorithm": "adamw_schedule_free"}, {"betas": [0.69, 0.9]}),
        ({"algorithm": "gpa_adamw"}, {}),
        ({"algorithm": "sgd"}, {}),
    ],
)
def test_betas_that_do_not_allow_a_correction_default_to_none(optimizer: dict[str, Any], group: dict[str, Any]) -> None:
    spec = {"optimizer": optimizer, "parameters": [{"name": "w", "shape": [1]}], "groups": {"slow": group}}
    assert Expectation.of(RunSpec.model_validate(spec)).after(0.0, 5, 9) == 0


@pytest.mark.parametrize(
    "correction", [{"name": "none"}, *({"name": name, "expected_staleness": 7.5} for name in ("constant", "ahead"))]
)
def test_a_constant_correction_does_not_follow_the_staleness(correction: dict[str, Any]) -> None:
    expected = correction.get("expected_staleness", 0.0)
    assert expectation(correction, policy="async").after(3.0, 40, 9) == expected


@settings(derandomize=True, deadline=None, max_examples=5, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 300)), max_size=60))
def test_the_expected_staleness_is_within_what_was_seen(pushes: list[tuple[int, int]]) -> None:
    followed, most, expected = expectation(AUTO, policy="async"), 0, 0.0
    for seen, live in pushes:
        before, expected = expected, followed.after(expected, seen, live)
        most = max(most, seen, live - 1)
        assert live - 1 <= expected <= most
        assert expected >= before - 0.5 or live > before


def test_the_expected_staleness_converges_to_a_constant_one() -> None:
    followed, expected = expectation(AUTO, policy="async"), 0.0
    for _ in range(400):
        expected = followed.after(expected, 25, 1)
    assert expected == pytest.approx(25, rel=1e-3)
    for _ in range(60):
        expected = followed.after(expected, 1, 2)
    assert expected < 2
