"""Rules, dashboard and the number of workers are what this repository has of them, and Prometheus takes them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chart.rendered import CHART, MATRIX, NAMESPACE, ROOT, manifests, only
from freestep_service.runs.telemetry import Metrics

VALUES = MATRIX["accounts and monitoring"]


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_rules_and_dashboard_are_the_ones_of_the_repository() -> None:
    yaml = pytest.importorskip("yaml")
    found = manifests(VALUES)
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    assert only(found, "PrometheusRule")["spec"] == rules
    board = only(found, "ConfigMap", "-dashboard")["data"]["freestep.json"]
    assert board == (ROOT / "deploy" / "grafana" / "freestep.json").read_text()
    # Not copies, of which one could be changed.
    assert all((CHART / "files" / name).is_symlink() for name in ("alerts.yml", "dashboard.json"))


def test_prometheus_takes_the_rules_as_they_are_rendered(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(json.dumps(only(manifests(VALUES), "PrometheusRule")["spec"]))
    shutil.copy(ROOT / "deploy" / "prometheus" / "alerts_test.yml", tmp_path)
    for done in (
        promtool("check", "rules", tmp_path / "alerts.yml"),
        promtool("test", "rules", tmp_path / "alerts_test.yml"),
    ):
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_scraped_is_the_job_of_the_alerts() -> None:
    found = manifests(VALUES)
    monitor = only(found, "ServiceMonitor")["spec"]
    (service,) = (
        each
        for each in found
        if each["kind"] == "Service"
        and monitor["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
    )
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "freestep"
    assert service["spec"]["clusterIP"] == "None", "one address would be one process by turns"
    (endpoint,), (port,) = monitor["endpoints"], service["spec"]["ports"]
    assert endpoint["port"] == port["name"] == endpoint["scheme"]


def query() -> str:
    (trigger,) = only(manifests(VALUES), "ScaledObject")["spec"]["triggers"]
    return str(trigger["metadata"]["query"])


def test_the_number_of_workers_is_asked_of_metrics_that_there_are() -> None:
    import re

    text = Metrics().text().decode()
    exposed = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
        exposed |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    named = set(re.findall(r"\bfreestep_\w+", query()))
    assert len(named) > 5 and named <= exposed


def series(**rates: float) -> list[dict[str, str]]:
    """Series of a run with these readings, of two processes, a minute; `pushes` of a minute are 60 unless given."""
    pushes = rates.pop("pushes", 60)
    run = 'run="de\\"mo"'
    found = []
    for name, value in rates.items():
        if name in ("open", "out", "done"):
            found.append({"series": f'freestep_units{{{run}, name="d", state="{name}"}}', "values": f"{value}x10"})
        elif name == "workers":
            found.append({"series": f'freestep_workers{{{run}, instance="a"}}', "values": f"{value}x10"})
        elif name in ("busy", "busier"):
            labels = f'{run}, phase="update", instance="{name}", namespace="{NAMESPACE}"'
            found.append({"series": f"freestep_push_phase_seconds_sum{{{labels}}}", "values": f"0+{value}x10"})
        else:
            metric = {"staleness": "freestep_staleness_steps", "seconds": "freestep_push_seconds"}[name]
            for part, each in (("sum", value * pushes), ("count", pushes)):
                found.append({"series": f'{metric}_{part}{{{run}, instance="a"}}', "values": f"0+{each:g}x10"})
    # Of another run, and of a run of that name elsewhere, which are none of its business.
    others = ('run="other", instance="a"', f'{run}, instance="a", namespace="elsewhere"')
    return [*found, *({"series": f"freestep_workers{{{labels}}}", "values": "100x10"} for labels in others)]


WANTED: dict[str, tuple[dict[str, float], float | None]] = {
    # 36 s of 60 are the target for the busiest of two processes, 16 steps that of staleness, 2 s that of a push.
    "as it should be": ({"workers": 4, "busy": 36, "busier": 1, "staleness": 3, "seconds": 0.1, "open": 99}, 4),
    "the service is idle": ({"workers": 4, "busy": 1, "busier": 2, "staleness": 3, "seconds": 0.1, "open": 99}, 8),
    "there is some room": ({"workers": 4, "busy": 1, "busier": 24, "staleness": 3, "seconds": 0.1, "open": 99}, 6),
    "gradients are stale": ({"workers": 40, "busy": 1, "staleness": 32, "seconds": 0.1, "open": 99}, 20),
    "pushes wait": ({"workers": 9, "busy": 1, "staleness": 1, "seconds": 3, "open": 99}, 6),
    "far too many": ({"workers": 40, "busy": 1, "staleness": 1000, "seconds": 30, "open": 99}, 20),
    "nobody has pushed yet": ({"workers": 4, "open": 99}, 4),
    "the run is paused": ({"workers": 4, "busy": 0, "staleness": 3, "seconds": 0.1, "pushes": 0, "open": 99}, 4),
    "nobody is there": ({"workers": 0, "open": 99}, 1),
    "few units are left": ({"workers": 4, "busy": 1, "staleness": 3, "seconds": 0.1, "open": 2, "out": 3}, 5),
    "all units are done": ({"workers": 4, "busy": 1, "staleness": 3, "seconds": 0.1, "open": 0, "out": 0}, 0),
    "without units": ({"workers": 4, "busy": 1, "staleness": 3, "seconds": 0.1}, 8),
    "no metrics": ({}, None),
}


@pytest.mark.parametrize(("readings", "wanted"), WANTED.values(), ids=WANTED)
def test_workers_are_added_while_there_is_room_and_work(
    readings: dict[str, float], wanted: float | None, tmp_path: Path
) -> None:
    expected: list[dict[str, Any]] = [] if wanted is None else [{"labels": "{}", "value": wanted}]
    test = {"expr": f"round(sum({query()}), 0.001)", "eval_time": "8m", "exp_samples": expected}
    document = {"tests": [{"interval": "1m", "input_series": series(**readings), "promql_expr_test": [test]}]}
    (tmp_path / "test.yml").write_text(json.dumps(document))
    done = promtool("test", "rules", tmp_path / "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
