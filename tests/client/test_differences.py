"""What differs between two specs, field by field and parameter by parameter."""

from __future__ import annotations

from typing import Any

import pytest

from freestep import Run, RunExists
from freestep.api.differences import SpecDifferences
from freestep.api.spec import RunSpec

SPEC: dict[str, Any] = {
    "optimizer": {"algorithm": "sgd", "lr": 0.5, "schedule": {"name": "linear", "total_steps": 10}},
    "parameters": [{"name": "w", "shape": [2, 3]}, {"name": "b.c", "shape": [3], "group": "own"}],
    "groups": {"own": {"lr": 0.1}},
}


def differences(**changes: Any) -> SpecDifferences:
    return SpecDifferences.of(RunSpec.model_validate({**SPEC, **changes}), RunSpec.model_validate(SPEC))


def listed(field: str, wanted: Any, existing: Any) -> dict[str, Any]:
    return {"field": field, "wanted": wanted, "existing": existing}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"optimizer": {**SPEC["optimizer"], "lr": 0.25}}, [listed("optimizer.lr", 0.25, 0.5)]),
        (
            {"optimizer": {**SPEC["optimizer"], "schedule": {"name": "cosine", "total_steps": 20}}},
            [listed("optimizer.schedule.name", "cosine", "linear")],
        ),
        (
            {"optimizer": {**SPEC["optimizer"], "schedule": {"name": "linear", "total_steps": 20}}},
            [listed("optimizer.schedule.total_steps", 20, 10)],
        ),
        # Hyperparameters of two algorithms are not compared.
        ({"optimizer": {"algorithm": "adamw"}}, [listed("optimizer.algorithm", "adamw", "sgd")]),
        ({"groups": {"own": {}}}, [listed("groups.own.lr", None, 0.1)]),
        (
            {"groups": {"own": {"lr": 0.1}, "more": {"lr": 1.0}}, "lease_ttl_ms": 1000},
            [listed("groups.more", {"lr": 1.0}, None), listed("lease_ttl_ms", 1000, 30_000)],
        ),
        (
            {"aggregation": {"policy": "buffered", "batch": 4}},
            [listed("aggregation.policy", "buffered", "ringmaster"), listed("aggregation.batch", 4, None)],
        ),
    ],
)
def test_each_field_is_named_with_both_values(changes: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    assert differences(**changes).listed() == expected


def test_parameters_are_missing_extra_changed_or_in_another_order() -> None:
    w, b = SPEC["parameters"]
    found = differences(parameters=[{"name": "w", "shape": [6]}, {"name": "v", "shape": []}])
    assert found.listed() == [
        listed("parameters.v", {"shape": [], "group": "default"}, None),
        listed("parameters.b.c", None, {"shape": [3], "group": "own"}),
        listed("parameters.w", {"shape": [6], "group": "default"}, {"shape": [2, 3], "group": "default"}),
    ]
    text = str(found)
    assert "the run lacks the parameters 'v' []; the run also has the parameters 'b.c' [3]; parameters.w is" in text
    assert differences(parameters=[w, {**b, "group": "default"}]).listed() == [
        listed("parameters.b.c", {"shape": [3], "group": "default"}, {"shape": [3], "group": "own"})
    ]
    swapped = differences(parameters=[b, w])
    assert swapped.listed() == [listed("parameters", ["b.c", "w"], ["w", "b.c"])]
    assert str(swapped) == "the order of the parameters is ['w', 'b.c'], and ['b.c', 'w'] is wanted"


def test_ten_of_each_kind_are_named() -> None:
    more = [{"name": f"extra{number}", "shape": [number]} for number in range(25)]
    found = differences(
        parameters=[*SPEC["parameters"], *more],
        groups={"own": {"lr": 0.1}, **{f"group{number}": {"lr": 1.0} for number in range(12)}},
    )
    assert [each["field"] for each in found.listed()] == [
        *(f"groups.group{number}" for number in range(10)),
        *(f"parameters.extra{number}" for number in range(10)),
    ]
    assert "and 2 more; the run lacks" in str(found)
    assert str(found).endswith("'extra9' [9], and 15 more")


def test_a_refused_create_names_them(run: Run) -> None:
    run.create(SPEC)
    with pytest.raises(RunExists, match=r"optimizer\.lr is 0\.5, and 0\.25 is wanted") as refused:
        run.create({**SPEC, "optimizer": {**SPEC["optimizer"], "lr": 0.25}})
    assert refused.value.extensions["differences"] == [listed("optimizer.lr", 0.25, 0.5)]
    assert run.status().spec == RunSpec.model_validate(SPEC)
    run.delete()
