"""`freestep data show`: how much of a run's data has counted, and who has what."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

import forked
from freestep import Run
from harness import ThreadService

SPEC = {"optimizer": {"algorithm": "sgd", "lr": 1.0}, "parameters": [{"name": "w", "shape": [2]}]}


@pytest.fixture
def begun(run: Run) -> Iterator[Run]:
    """A run whose worker has pushed one unit of three, and has another."""
    run.create(SPEC)
    run.initialize({"w": torch.zeros(2)})
    run.data("train").create({"length": 10, "unit": 4, "passes": 2, "shuffle": "none"})
    run.data("endless").create({"length": 3, "unit": 1, "passes": None})
    with run.lease("worker-1") as lease:
        run.data("train").claim(lease.granted, 2)
        run.push({"w": torch.ones(2)}, lease.claim(0, units={"train": [0]}))
        yield run


def test_a_runs_data_is_shown(begun: Run, service: ThreadService) -> None:
    shown = forked.freestep("data", "show", begun.name, FREESTEP_URL=service.url)
    assert shown.returncode == 0, shown.stderr
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert ["train", "10", "4", "0", "of", "2", "done", "4", "1", "1", "4"] in rows
    assert ["endless", "3", "1", "0", "done", "-", "0", "0", "0"] in rows
    assert ["train", "0", "1", "1", "1"] in rows
    assert any(row[:3] == ["train", "worker-1", "1"] for row in rows)


def test_it_is_shown_as_json(begun: Run, service: ThreadService) -> None:
    shown = forked.freestep("data", "show", begun.name, "--json", FREESTEP_URL=service.url)
    found = {each["name"]: each for each in json.loads(shown.stdout)}
    assert found["train"]["done"] == 1 and found["train"]["passes"] == [{"pass": 0, "open": 1, "out": 1, "done": 1}]
    assert [each["worker"] for each in found["train"]["holders"]] == ["worker-1"]


def test_a_run_without_data_and_none_at_all(run: Run, service: ThreadService) -> None:
    absent = forked.freestep("data", "show", run.name, FREESTEP_URL=service.url)
    assert absent.returncode == 1 and absent.stdout == ""
    run.create(SPEC)
    shown = forked.freestep("data", "show", run.name, FREESTEP_URL=service.url)
    assert (shown.returncode, shown.stdout) == (0, f"the run {run.name} has no data sets\n")
    assert forked.freestep("data", "show", run.name, "--json", FREESTEP_URL=service.url).stdout == "[]\n"
