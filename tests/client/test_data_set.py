"""Data sets through the client: created, their units taken, given back, and counted by the pushes that name them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from freestep import (
    Client,
    DataExists,
    DataNotFound,
    HeldLease,
    MalformedRequest,
    Run,
    RunNotInitialized,
    RunState,
    UnitNotHeld,
)
from harness import ThreadService

SPEC = {
    "optimizer": {"algorithm": "sgd", "lr": 1.0},
    "aggregation": {"policy": "async"},
    "parameters": [{"name": "w", "shape": [2]}],
}
DATA = {"length": 10, "unit": 4, "shuffle": "none"}
GRADIENT = {"w": torch.ones(2)}


@pytest.fixture
def lease(run: Run) -> Iterator[HeldLease]:
    run.create(SPEC)
    run.initialize({"w": torch.zeros(2)})
    with run.lease("first") as held:
        yield held


def test_units_count_with_the_push_that_names_them(run: Run, lease: HeldLease) -> None:
    data = run.data("train")
    created = data.create(DATA)
    assert (created.units, created.open, created.done) == (3, 3, 0)
    assert data.create(DATA).spec == created.spec
    taken = data.claim(lease.granted, 2)
    assert [(each.unit, each.of_pass, each.begin, each.end) for each in taken.units] == [(0, 0, 0, 4), (1, 0, 4, 8)]
    assert [(each.worker, each.units) for each in data.status().holders] == [("first", 2)]
    receipt = run.push(GRADIENT, lease.claim(0, units={"train": [0]}))
    assert receipt.decision == "applied"
    after = data.status()
    assert (after.open, after.out, after.done, after.examples_done) == (1, 1, 1, 4)
    assert [each.name for each in run.data_sets()] == ["train"]


def test_units_that_are_given_back_are_others(run: Run, lease: HeldLease) -> None:
    data = run.data("train")
    data.create(DATA)
    data.claim(lease.granted, 3)
    with run.lease("second") as other:
        waiting = data.claim(other.granted, 3)
        assert (waiting.units, waiting.exhausted) == ([], False)
        assert data.give_back(lease.granted, [1]) == [1]
        assert [each.unit for each in data.claim(other.granted, 3).units] == [1]
        assert sorted(data.give_back(lease.granted)) == [0, 2]
        assert data.give_back(lease.granted) == []
        with pytest.raises(UnitNotHeld):
            run.push(GRADIENT, lease.claim(0, units={"train": [1]}))
    assert run.status().step == 0


def test_what_has_counted_goes_with_the_state(
    service: ThreadService, run: Run, lease: HeldLease, tmp_path: Path
) -> None:
    data = run.data("train")
    data.create(DATA)
    data.claim(lease.granted, 1)
    run.push(GRADIENT, lease.claim(0, units={"train": [0]}))
    run.export_state().save(tmp_path / "state")
    run.overwrite({"w": torch.ones(2)})
    assert data.status().done == 1
    with Client(service.url) as client:
        other = client.run(f"{run.name}-other")
        other.import_state(RunState.load(tmp_path / "state"))
        assert other.data("train").status().done == 1


def test_a_claim_says_when_all_has_counted(run: Run, lease: HeldLease) -> None:
    data = run.data("train")
    data.create(DATA)
    numbers = [each.unit for each in data.claim(lease.granted, 5).units]
    run.push(GRADIENT, lease.claim(0, units={"train": numbers}))
    rest = data.claim(lease.granted, 5, wait=30.0)
    assert (rest.units, rest.exhausted) == ([], True)


def test_what_cannot_be_is_refused(run: Run) -> None:
    run.create(SPEC)
    with pytest.raises(RunNotInitialized):
        run.data("train").create(DATA)
    run.initialize({"w": torch.zeros(2)})
    with pytest.raises(DataNotFound):
        run.data("train").status()
    run.data("train").create(DATA)
    with pytest.raises(DataExists):
        run.data("train").create({**DATA, "unit": 5})
    with pytest.raises(MalformedRequest):
        run.data("other").create({**DATA, "unit": 0})
    assert [each.name for each in run.data_sets()] == ["train"]
