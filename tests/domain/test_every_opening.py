"""What a run goes on from, for every combination of what Redis and up to two shards can say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import pytest

from freestep_service.domain.opening import Decision, Report, Waiting, decide
from freestep_service.domain.records import CheckpointId, LogPosition
from freestep_service.domain.run_view import RunView

EARLIER, LATER, NEWER_EPOCH = CheckpointId(2, 3, 3), CheckpointId(2, 7, 9), CheckpointId(3, 1, 1)
NOTHING = CheckpointId(2, 0, 0)
PLACES = (EARLIER, LATER, NEWER_EPOCH)
RULES = {"spec": "{}", "batch": "1", "max_staleness": "none", "distinct": "0", "phase": "gather", "generation": "1"}


def views() -> Iterator[RunView]:
    """Lost, or at some place; with the marks of a durable checkpoint and of a division into other shards."""
    states: list[dict[str, Any]] = [{"lost": "1"}]
    for place in (NOTHING, *PLACES):
        for initialized in "01":
            if place == NOTHING or initialized == "1":
                numbers = {"epoch": str(place.epoch), "step": str(place.step), "seq": str(place.seq)}
                states.append({**numbers, "initialized": initialized})
    for state, durable, recut in product(states, (False, True), (False, True)):
        marks = {name: "1" for name, is_set in (("durable", durable), ("recut", recut)) if is_set}
        yield RunView(RULES | state | marks, {}, 0)


def reports() -> Iterator[Report]:
    """Of shards that hold a state, that were left at one, or of which there are checkpoints at most."""
    for count in range(len(PLACES) + 1):
        for offers in combinations(PLACES, count):
            for epoch in (2, 4):
                yield Report(epoch, offers=offers)
                yield Report(epoch, live=NOTHING, offers=offers)
                for place in PLACES:
                    yield Report(epoch, initialized=True, live=place, offers=offers)
                    yield Report(epoch, closed=LogPosition(place.epoch, place.seq), offers=offers)


REPORTS = list(reports())


def decided(view: RunView, *given: Report) -> Decision | None:
    """None where the run waits."""
    try:
        return decide(view, given)
    except Waiting:
        return None


def check(view: RunView, *given: Report) -> None:
    decision = decided(view, *given)
    newest = max(
        view.number("epoch"),
        *(report.epoch for report in given),
        *(offer.epoch for report in given for offer in report.offers),
    )
    common = set(given[0].offers).intersection(*(report.offers for report in given))
    is_durable = "durable" in view.run or any(report.offers for report in given)
    if decision is None:
        # Only for a checkpoint of which a part is missing.
        assert is_durable and not common
        return
    if decision.live:
        # Every shard is at that place, in the newest epoch that anybody knows of, so nothing is lost.
        assert {report.place for report in given} == {decision.cut}
        assert decision.cut is not None
        assert decision.epoch == decision.cut.epoch == newest
        assert "recut" not in view.run
        assert decision.initialized == all(report.initialized or report.live is None for report in given)
        # Redis does not know of more, and where it knows of less a shard has more than a checkpoint.
        known = (view.number("epoch"), view.number("seq"))
        assert "lost" in view.run or known <= (decision.cut.epoch, decision.cut.seq)
        return
    if decision.cut is not None:
        assert decision.cut == max(common)
        assert decision.initialized
        assert decision.epoch == newest + 1
        return
    # A run begins anew only where there is nothing durable, and then without weights.
    assert not decision.initialized
    assert not any(report.offers for report in given)
    assert "durable" not in view.run
    is_new = "lost" not in view.run and not view.number("initialized") and not any(r.initialized for r in given)
    assert decision.epoch == newest + 1 or (is_new and decision.epoch == newest)


def test_the_table_is_whole() -> None:
    assert (len(list(views())), len(REPORTS)) == (24, 128)


@pytest.mark.parametrize("view", list(views()), ids=lambda view: "-".join(sorted(view.run.keys() - RULES.keys())))
def test_one_shard(view: RunView) -> None:
    for report in REPORTS:
        check(view, report)
        # Two shards that say the same go on as one that says it.
        assert decided(view, report, report) == decided(view, report)


@pytest.mark.parametrize("view", list(views()), ids=lambda view: "-".join(sorted(view.run.keys() - RULES.keys())))
def test_two_shards(view: RunView) -> None:
    for one, other in combinations(REPORTS, 2):
        check(view, one, other)
        assert decided(view, one, other) == decided(view, other, one)


def test_the_table_has_every_outcome() -> None:
    outcomes = set()
    for view in views():
        for one, other in product(REPORTS[::5], repeat=2):
            decision = decided(view, one, other)
            outcomes.add(None if decision is None else (decision.live, decision.cut is None, decision.initialized))
    assert outcomes == {
        None, (True, False, True), (True, False, False), (False, False, True), (False, True, False),
    }  # fmt: skip
