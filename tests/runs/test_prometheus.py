"""What /metrics has: the names that are documented and no others, and series whose number no worker can raise."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from freestep_service.runs.histograms import Histogram
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import Api
from shards.runs import sharded

ROOT = Path(__file__).parents[2]
Found = dict[str, tuple[str, set[str]]]


def exposed(api: Api) -> Found:
    """Each metric with its type and the labels of its series."""
    found: Found = {}
    for family in text_string_to_metric_families(api.http.get("/metrics").text):
        if family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = family.type, labels
    return found


def documented() -> Found:
    """The table of the page."""
    rows = re.findall(
        r"^\| `((?:freestep|process)_\w+)` \| (\w+) \|([^|]*)\|",
        (ROOT / "docs" / "metrics.md").read_text(),
        re.MULTILINE,
    )
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def value(api: Api, name: str, **labels: str) -> float:
    """The sum of the series that have these labels, of this run."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(api.http.get("/metrics").text)
        for sample in family.samples
        if sample.name == name and ({"run": api.run} | labels).items() <= sample.labels.items()
    )


@pytest.fixture
def lived(api: Api) -> Api:
    """A journaled run to which everything has happened that its metrics tell of."""
    api.create(durability="journal", aggregation={"policy": "async", "max_staleness": 0})
    lease = api.lease("me")
    assert api.http.put(api.path("/data/train"), json={"length": 10, "unit": 2}).status_code == 201
    api.push(lease, 0, "once", Freestep_Loss="0.5", Prefer="return=representation")
    api.push(lease, 0, "once", Freestep_Loss="0.5")
    api.push(lease, 1)
    assert api.push(lease, 0).json()["decision"] == "dropped"
    api.http.post(api.path("/metrics"), json={"name": "acc", "value": 0.5, "step": 2})
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    assert api.pull("x")[1] == 2
    assert api.http.delete(api.path(f"/leases/{lease['lease']}")).status_code == 204
    # The data set's units are counted from then on.
    api.http.get(api.path("/data/train"))
    return api


def test_what_is_documented_is_exposed_and_nothing_else(lived: Api) -> None:
    assert lived.http.get("/v1/runs/none").status_code == 404
    told, shown = documented(), exposed(lived)
    assert told.keys() == shown.keys()
    assert {name: kind for name, (kind, _) in told.items()} == {name: kind for name, (kind, _) in shown.items()}
    assert {name: labels for name, (_, labels) in shown.items() if labels} == {
        name: told[name][1] for name, (_, labels) in shown.items() if labels
    }


def test_a_push_is_measured_by_phase(lived: Api) -> None:
    count = "freestep_push_phase_seconds_count"
    phases = {phase: value(lived, count, phase=phase) for phase in ("admit", "queue", "receive", "commit", "update")}
    assert phases == dict.fromkeys(phases, 2)
    assert value(lived, count, phase="answer") == 1
    whole = value(lived, "freestep_push_seconds_sum")
    parts = sum(value(lived, "freestep_push_phase_seconds_sum", phase=phase) for phase in phases)
    assert 0 < parts <= whole
    assert value(lived, "freestep_dropped_pushes_total", reason="stale") == 1
    assert value(lived, "freestep_staleness_steps_count") == 2
    assert value(lived, "freestep_leases_total", change="granted") == 1
    assert value(lived, "freestep_leases_total", change="released") == 1
    assert value(lived, "freestep_journal_flush_seconds_count") > 0
    assert value(lived, "freestep_journal_bytes") > 0
    assert value(lived, "freestep_shards") == 1
    assert value(lived, "freestep_run_problem") == 0


def test_what_is_counted_later_begins_at_0(api: Api) -> None:
    """Prometheus sees no rise in a series that begins at 1."""
    api.create()
    zeros = {line.rpartition(" ")[0] for line in api.http.get("/metrics").text.splitlines() if line.endswith(" 0.0")}
    run = f'run="{api.run}"'
    assert zeros >= {
        f"freestep_checkpoint_failures_total{{{run}}}",
        f"freestep_replays_total{{{run}}}",
        *(
            f'freestep_leases_total{{change="{change}",{run}}}'
            for change in ("granted", "released", "ended", "expired")
        ),
        *(f'freestep_pushes_total{{decision="{each}",{run}}}' for each in ("applied", "accumulated", "dropped")),
        *(
            f'freestep_dropped_pushes_total{{reason="{reason}",{run}}}'
            for reason in ("stale", "duplicate-worker", "norms-unknown", "other")
        ),
        "freestep_redis_failures_total",
    }


def test_a_paused_run_is_shown(api: Api) -> None:
    api.create()
    for paused in (True, False):
        assert api.http.patch(api.path(), json={"paused": paused}).status_code == 200
        wait_until(lambda expected=paused: value(api, "freestep_paused") == expected)


def test_a_checkpoint_is_overdue_by_what_the_service_is_set_to(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    overdue = "freestep_checkpoint_overdue_seconds"
    patient = connect(start_service(tmp_path / "patient", checkpoint_seconds=86400).url, "patient")
    hasty = connect(start_service(tmp_path / "hasty", checkpoint_seconds=0.001).url, "hasty")
    for api in (patient, hasty):
        api.create()
    checkpoints = tmp_path / "hasty" / "runs" / "hasty" / "checkpoints"
    moved = checkpoints.rename(checkpoints.with_name("moved"))
    checkpoints.touch()
    for api in (patient, hasty):
        api.push(api.lease(), 0)
    wait_until(lambda: value(hasty, overdue) > 0)
    assert value(patient, overdue) == 0 and f'{overdue}{{run="patient"}}' in series(patient)
    checkpoints.unlink()
    moved.rename(checkpoints)
    hasty.http.post(hasty.path("/checkpoints")).raise_for_status()
    assert value(hasty, overdue) == 0
    brief = connect(hasty.url, "brief")
    brief.create(durability="none")
    brief.push(brief.lease(), 0)
    assert f'{overdue}{{run="brief"}}' not in series(brief)


def test_each_shard_measures_its_part(
    shared_nodes: Callable[..., list[ThreadService]], connect: Callable[..., Api]
) -> None:
    nodes = shared_nodes(2)
    with sharded(nodes) as api:
        api.create(shards=2)
        seen = [connect(node.url, api.run) for node in nodes]
        answer = seen[0].push(api.lease(), 0)
        assert (answer.status_code, answer.json()["decision"]) == (200, "applied")
        assert sum(value(each, "freestep_shards") for each in seen) == 2
        for phase in ("admit", "queue", "receive", "commit", "update"):
            assert sum(value(each, "freestep_push_phase_seconds_count", phase=phase) for each in seen) == 2
        assert sum(value(each, "freestep_push_seconds_count") for each in seen) == 1


def series(api: Api) -> set[str]:
    """The series of a run, by name and labels."""
    lines = api.http.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if f'run="{api.run}"' in line}


NAMES = ["w", "</script><b>", 'a"} 1\nfreestep_step{run="x', "\\", "{}", "é" * 60, "run", "=" * 120]


def test_workers_make_no_series_whatever_they_call_themselves(api: Api) -> None:
    api.create()
    known: list[set[str]] = []
    for name in ["w", *NAMES, *(f"worker-{number}" for number in range(40))]:
        granted = api.http.post(api.path("/leases"), json={"worker": name})
        if granted.status_code != 201:
            assert granted.status_code == 422, granted.text
            continue
        answer = api.push(granted.json(), len(known), f"key-{len(known)}", Freestep_Loss="1")
        assert answer.status_code == 200, answer.text
        if not known:
            # A heartbeat counts the live leases.
            wait_until(lambda: any(each.startswith("freestep_workers{") for each in series(api)))
        known.append(series(api))
    assert len(known) > 40
    assert known[-1] == known[0]
    text = api.http.get("/metrics").text
    assert not [name for name in NAMES[1:] if len(name) > 5 and name in text]
    api.http.delete(api.path())
    assert not series(api)


def test_series_of_metrics_are_as_many_as_a_run_may_have(api: Api) -> None:
    api.create()
    statuses = [
        api.http.post(api.path("/metrics"), json={"name": f"m{number}", "value": 1, "step": 0}).status_code
        for number in range(300)
    ]
    shown = [line for line in series(api) if line.startswith("freestep_metric{")]
    assert len(shown) == statuses.count(200) < 300


def test_names_are_escaped(api: Api) -> None:
    api.create()
    for name in NAMES:
        assert api.http.post(api.path("/metrics"), json={"name": name, "value": 1, "step": 0}).status_code == 200
    families = text_string_to_metric_families(api.http.get("/metrics").text)
    (metric,) = [family for family in families if family.name == "freestep_metric"]
    assert {sample.labels["name"] for sample in metric.samples if sample.labels["run"] == api.run} == set(NAMES)


def test_a_histogram_counts_as_prometheus_has_it() -> None:
    registry = CollectorRegistry()
    made = Histogram("h_seconds", "Of a test.", ["run"], (1, 2.5), registry)
    for each in (0.5, 1.0, 1.5, 2.5, 99.0):
        made.labels("a").observe(each)
    made.labels("b")
    lines = generate_latest(registry).decode().splitlines()
    assert [line for line in lines if 'run="a"' in line] == [
        'h_seconds_bucket{le="1.0",run="a"} 2.0',
        'h_seconds_bucket{le="2.5",run="a"} 4.0',
        'h_seconds_bucket{le="+Inf",run="a"} 5.0',
        'h_seconds_count{run="a"} 5.0',
        'h_seconds_sum{run="a"} 104.5',
    ]
    made.remove("a")
    assert 'run="a"' not in generate_latest(registry).decode()
