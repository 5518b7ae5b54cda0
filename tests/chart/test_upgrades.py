"""What an upgrade of a release changes: nothing that Kubernetes does not let change, and no more than it has to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chart.rendered import MATRIX, VALUES, Manifest, manifests


def test_a_job_of_workers_that_changes_is_another() -> None:
    values = MATRIX["your own"]
    first = _job(values)
    changes: dict[str, Any] = {
        "image": "registry.example.org/worker:2",
        "job": {"completions": 17},
        "command": ["python", "other.py"],
    }
    for name, change in changes.items():
        assert _job({**values, "workers": {**values["workers"], name: change}}) != first, name
    patient = {**values["workers"]["job"], "backoffLimitPerIndex": 3}
    assert _job({**values, "workers": {**values["workers"], "job": patient}}) != first
    assert _job({**values, "workers": {**values["workers"], "replicas": 5}}) == first


def _job(values: dict[str, Any]) -> str:
    names = [each["metadata"]["name"] for each in manifests(values) if each["kind"] == "Job"]
    (name,) = (each for each in names if "-workers-" in each)
    return str(name)


@VALUES
@pytest.mark.parametrize("image", [{}, {"tag": "another"}], ids=["its own image", "another image"])
def test_an_upgrade_changes_nothing_that_cannot_be_and_restarts_shards_alone(
    image: dict[str, str], values: dict[str, Any], next_chart: Path
) -> None:
    before = {(each["kind"], each["metadata"]["name"]): each for each in _of_the_release(manifests(values))}
    newer = {**values, "image": {**values.get("image", {}), **image}}
    restarted = set()
    for after in _of_the_release(manifests(newer, next_chart)):
        kind, name = after["kind"], after["metadata"]["name"]
        if kind == "Job" and (kind, name) not in before:
            # Another Job in the place of one that has ended: it runs once more.
            restarted.add(after["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"])
            continue
        old, new = before[kind, name].get("spec", {}), after.get("spec", {})
        assert after["metadata"]["labels"]["app.kubernetes.io/version"] == "99.0.0"
        if kind == "Job":
            assert old == new
        elif kind in ("StatefulSet", "Deployment"):
            may_change = ("replicas", "template", "updateStrategy", "strategy")
            assert {part: old[part] for part in old if part not in may_change} == {
                part: new[part] for part in new if part not in may_change
            }
            if old["template"] != new["template"]:
                restarted.add(new["template"]["metadata"]["labels"]["app.kubernetes.io/component"])
    assert restarted == {"shards"} | ({"reshard"} if "reshard" in values else set())


def _of_the_release(found: list[Manifest]) -> list[Manifest]:
    """Without hooks, which are made anew each time."""
    return [each for each in found if "helm.sh/hook" not in each["metadata"].get("annotations", {})]
