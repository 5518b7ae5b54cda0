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
_SELECTED = re.compile(r"\b((?:freestep|process)_[a-z_]+)(?:\{([^}]*)\})?")
"""A name, and the selector behind it if there is one."""
_BY = re.compile(r"\bby \(([^)]*)\)")
_TARGET_LABELS = {"job", "namespace", "instance", "le"}
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


def labels_by_name() -> dict[str, set[str]]:
    """The labels of each metric, as the page has them."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| \w+ \|([^|]*)\|", page, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", row)) for name, row in rows}


def labels() -> set[str]:
    """The labels that the page names."""
    return set().union(*labels_by_name().values()) | _TARGET_LABELS


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "freestep.json").read_text())
    return document


def rules() -> dict[str, str]:
    """The query of every rule."""
    found: list[dict[str, str]] = yaml(PROMETHEUS / "alerts.yml")["groups"][0]["rules"]
    return {f"alert {rule['alert']}": rule["expr"] for rule in found}


def dashboard_queries() -> dict[str, str]:
    """Every query of the dashboard, by where it stands."""
    board, found = dashboard(), {}
    for panel in board["panels"]:
        found |= {f"panel {panel['id']}, {each['refId']}": each["expr"] for each in panel["targets"]}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = variable["query"]["query"]
    return found | {f"annotation {each['name']}": each["expr"] for each in board["annotations"]["list"]}


def queries() -> dict[str, str]:
    """Every query of rules and of the dashboard, by where it stands."""
    return rules() | dashboard_queries()


def filled(query: str) -> str:
    """A query as Grafana asks it where all is chosen."""
    return re.sub(r"\$(job|namespace|run)\b", ".*", query.replace("$__rate_interval", "5m"))


def test_queries_name_what_is_exposed() -> None:
    exposed, known = samples(), labels()
    for place, query in queries().items():
        named = set(_NAME.findall(query)) - known
        assert named or re.search(r"\bup{", query), place
        assert named <= exposed, place
        used = {label for _, selector in _SELECTED.findall(query) for label in re.findall(r"(\w+)\s*=", selector)}
        used |= {label.strip() for group in _BY.findall(query) for label in group.split(",")}
        assert used <= known, place


def test_what_is_chosen_holds_for_each_query_of_the_dashboard() -> None:
    variables = [each["name"] for each in dashboard()["templating"]["list"]]
    assert variables == ["datasource", "job", "namespace", "run"]
    of_runs = {name for name, found in labels_by_name().items() if "run" in found}
    for place, query in dashboard_queries().items():
        for name, selector in _SELECTED.findall(query):
            chosen = {"job", "namespace"} | ({"run"} if re.sub("_(bucket|sum|count)$", "", name) in of_runs else set())
            if place.startswith("variable "):
                # What is offered is chosen from by the variables before it.
                chosen &= set(variables[: variables.index(place.removeprefix("variable "))])
            assert set(re.findall(r'(\w+)=~"\$\1"', selector)) == chosen, f"{place}: {name}"


def test_rules_take_runs_of_one_name_at_two_services_for_two() -> None:
    for place, query in rules().items():
        for group in _BY.findall(query):
            if "run" in group.split(", "):
                assert {"job", "namespace"} <= set(group.split(", ")), place


def test_curves_have_their_units() -> None:
    for panel in dashboard()["panels"]:
        if panel["type"] != "timeseries":
            # A single number has its unit in the title.
            continue
        units = {
            override["matcher"]["options"]: each["value"]
            for override in panel["fieldConfig"]["overrides"]
            for each in override["properties"]
            if override["matcher"]["id"] == "byFrameRefID" and each["id"] == "unit"
        }
        for target in panel["targets"]:
            shown = units.get(target["refId"], panel["fieldConfig"]["defaults"]["unit"])
            assert shown == unit(target["expr"]), f"{panel['title']}, {target['refId']}"


def unit(query: str) -> str:
    """What the values of a query are measured in, as Grafana calls it."""
    name = _NAME.findall(query)[0]
    is_rate = "rate(" in query
    if name == "process_cpu_seconds_total":
        return "percentunit"
    if "_seconds" in name:
        return "s"
    if "_bytes" in name:
        return "Bps" if is_rate else "bytes"
    return "ops" if is_rate and name.endswith("_total") else "short"


def test_what_a_crash_costs_is_that_of_the_run_it_costs_most(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    (panel,) = (each for each in dashboard()["panels"] if each["title"] == "A crash now costs steps")
    query = filled(panel["targets"][0]["expr"])
    values = {
        'run="old", job="a", instance="1"': (1000, 1000),
        'run="new", job="a", instance="1"': (60, None),
        'run="new", job="a", instance="2"': (59, 20),
        'run="new", job="b", instance="1"': (100, 99),
    }
    series = [
        {"series": f"freestep_{name}{{{labels}}}", "values": f"{value}x2"}
        for labels, given in values.items()
        for name, value in zip(("step", "checkpoint_step"), given, strict=True)
        if value is not None
    ]
    test = {"expr": query, "eval_time": "1m", "exp_samples": [{"labels": "{}", "value": 40}]}
    document = {"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [test]}]}
    (tmp_path / "test.yml").write_text(json.dumps(document))
    command = [promtool, "test", "rules", str(tmp_path / "test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


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
    tests: dict[str, list[bool]] = {}
    for test in yaml(PROMETHEUS / "alerts_test.yml")["tests"]:
        for each in test["alert_rule_test"]:
            tests.setdefault(f"alert {each['alertname']}", []).append(bool(each["exp_alerts"]))
    assert tests.keys() == rules().keys()
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
    records = [
        {"record": f"query:{number}", "expr": filled(query)}
        for number, (place, query) in enumerate(queries().items())
        if not place.startswith("variable")
    ]
    # YAML has all of JSON.
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": records}]}))
    command = [promtool, "check", "rules", str(tmp_path / "rules.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(records)} rules found" in done.stdout


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
