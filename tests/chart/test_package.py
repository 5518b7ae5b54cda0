"""The files of the chart: its values and their schema, its version, and what becomes of links when it is copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import freestep
from chart.rendered import CHART, MATRIX, NAMESPACE, RELEASE, Manifest, helm, manifests


def test_each_value_is_in_the_schema_and_has_a_default() -> None:
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(given: Any, allowed: dict[str, Any], place: str) -> None:
        allowed = schema["definitions"][allowed["$ref"].rpartition("/")[2]] if "$ref" in allowed else allowed
        if "properties" in allowed and given:
            assert given.keys() == allowed["properties"].keys() - {"global"}, place
            assert allowed["additionalProperties"] is False, place
            for name, each in given.items():
                compare(each, allowed["properties"][name], f"{place}.{name}")

    compare(values, schema, "values")


def test_a_package_of_the_chart_has_what_links_lead_to(tmp_path: Path) -> None:
    values = MATRIX["accounts and monitoring"]
    helm()
    from helm_python.chart import Chart, package

    with Chart.load(package(CHART, destination=tmp_path)) as chart:
        files = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    with Chart.load(CHART) as chart:
        assert files == chart.render(values, name=RELEASE, namespace=NAMESPACE)
    assert "FreestepAway" in files["freestep/templates/monitoring.yaml"]


@pytest.mark.parametrize(
    ("file", "part"), [("alerts.yml", "prometheusRule"), ("dashboard.json", "dashboard")], ids=["rules", "dashboard"]
)
def test_a_copy_that_has_lost_its_links_is_refused(file: str, part: str, next_chart: Path) -> None:
    """As Flux makes it of a repository."""
    (next_chart / "files" / file).unlink()
    values = {"monitoring": {part: {"enabled": True}}}
    helm_error = helm().HelmError
    with pytest.raises(helm_error, match=f"files/{file} is empty"):
        manifests(values, next_chart)
    assert manifests({}, next_chart)


def test_the_chart_is_of_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    chart: Manifest = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == freestep.__version__
