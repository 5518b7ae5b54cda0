"""What is given to Prometheus and Grafana asks for what services have, and alerts when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from freestep_service.runs.telemetry import Metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
_NAME = re.compile(r"\b((?:freestep|process)_[a-z_]+)\b")
_OTHERS = {"up"}
"""Prometheus's own."""
_SELECTED = re.compile(r"\b((?:freestep|process)_[a-z_]+)\{([^}]*)\}")
_BY = re.compile(r"\bby \(([^)]*)\)")
_TARGET_LABELS = {"job", "instance", "le"}
"""Of Prometheus's, beside those that services give."""


def yaml(file: Path) -> Any:
    return pytest.importorskip("yaml", reason="PyYAML is not installed").safe_load(file.read_text())


def samples() -> set[str]:
    """The names of the samples of all metrics, as queries name them."""
    text = Metrics().text().decode()
    found: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


def labels() -> set[str]:
    """The labels that the page names."""
    rows = re.findall(r"^\| `\w+` \| \w+ \|([^|]*)\|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    return {label for row in rows for label in re.findall(r"`(\w+)`", row)} | _TARGET_LABELS


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "freestep.json").read_text())
    return document


def queries() -> dict[str, str]:
    """Every query of rules and of the dashboard, by where it stands."""
    rules = yaml(PROMETHEUS / "alerts.yml")["groups"][0]["rules"]
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules}
    board = dashboard()
    for panel in board["panels"]:
        found |= {f"panel {panel['id']}, {each['refId']}": each["expr"] for each in panel["targets"]}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = variable["query"]["query"]
    return found | {f"annotation {each['name']}": each["expr"] for each in board["annotations"]["list"]}


def test_queries_name_what_is_exposed() -> None:
    exposed, known = samples(), labels()
    for place, query in queries().items():
        named = set(_NAME.findall(query)) - known
        assert named or query.startswith("up{"), place
        assert named <= exposed, place
        used = {label for _, selector in _SELECTED.findall(query) for label in re.findall(r"(\w+)\s*=", selector)}
        used |= {label.strip() for group in _BY.findall(query) for label in group.split(",")}
        assert used <= known, place


def test_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells


def test_each_rule_is_tested_both_ways() -> None:
    rules = {rule["alert"] for rule in yaml(PROMETHEUS / "alerts.yml")["groups"][0]["rules"]}
    tests: dict[str, list[bool]] = {}
    for test in yaml(PROMETHEUS / "alerts_test.yml")["tests"]:
        for each in test["alert_rule_test"]:
            tests.setdefault(each["alertname"], []).append(bool(each["exp_alerts"]))
    assert tests.keys() == rules
    assert all(sorted(found) == [False, True] for found in tests.values())


@pytest.mark.parametrize("command", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")])
def test_prometheus_takes_the_rules(command: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    done = subprocess.run([promtool, *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    rules = []
    for number, (place, query) in enumerate(queries().items()):
        if not place.startswith("variable"):
            filled = query.replace("$__rate_interval", "5m").replace("$run", ".*").replace("$job", ".*")
            rules.append({"record": f"query:{number}", "expr": filled})
    # YAML has all of JSON.
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    command = [promtool, "check", "rules", str(tmp_path / "rules.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    token = tmp_path / "token"
    token.touch()
    text = (PROMETHEUS / "prometheus.yml").read_text().replace("/etc/prometheus/freestep-token", str(token))
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
    done = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
