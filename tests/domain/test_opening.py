"""What a run goes on from, case by case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from freestep_service.domain.opening import Decision, Exchange, Report, Waiting, common_checkpoint, decide, exchange
from freestep_service.domain.records import CheckpointId, LogPosition
from freestep_service.domain.run_view import RunView

AT_7 = CheckpointId(2, 7, 9)
"""Where the log of these runs ends: entry 9 of epoch 2, at step 7."""
AT_5 = CheckpointId(2, 5, 6)
AT_3 = CheckpointId(2, 3, 3)
NOTHING = CheckpointId(2, 0, 0)
LOST: dict[str, Any] = {"lost": 1}


RULES = {"spec": "{}", "batch": 1, "max_staleness": "none", "distinct": 0, "phase": "gather", "generation": 1}


def standing(place: CheckpointId = AT_7, *, initialized: int = 1, **fields: Any) -> RunView:
    run = {"epoch": place.epoch, "step": place.step, "seq": place.seq, "initialized": initialized, **fields}
    return RunView({name: str(value) for name, value in (RULES | run).items()}, {}, 0)


def lost(**fields: Any) -> RunView:
    """Of a Redis that came back without the run."""
    return RunView({name: str(value) for name, value in (RULES | LOST | fields).items()}, {}, 0)


def live(place: CheckpointId = AT_7, *offers: CheckpointId, epoch: int = 2) -> Report:
    return Report(epoch, initialized=True, live=place, offers=offers)


def closed(place: CheckpointId = AT_7, *offers: CheckpointId, epoch: int = 2) -> Report:
    """Of a shard that was left in order, with the checkpoint that its process wrote then among its offers."""
    return Report(epoch, closed=LogPosition(place.epoch, place.seq), offers=[*offers, place])


def stored(*offers: CheckpointId, epoch: int = 2) -> Report:
    """Of a shard that is nowhere but in checkpoints."""
    return Report(epoch, offers=offers)


# Reports


@pytest.mark.parametrize(
    "report",
    [
        Report(1),
        Report(3, initialized=True, live=AT_7, offers=[AT_3, AT_5]),
        Report(2, closed=LogPosition(2, 9), offers=[AT_7]),
    ],
)
def test_a_report_is_read_as_it_was_written(report: Report) -> None:
    read = Report.from_json(report.to_json())
    assert (read.epoch, read.initialized, read.live, read.closed) == (
        report.epoch,
        report.initialized,
        report.live,
        report.closed,
    )
    assert list(read.offers) == list(report.offers)
    assert isinstance(read.live, CheckpointId | None)
    assert isinstance(read.closed, LogPosition | None)
    assert read.place == report.place


@pytest.mark.parametrize(
    ("report", "place"),
    [
        (stored(), None),
        (stored(AT_5), None),
        (live(AT_7, AT_5), AT_7),
        (closed(AT_7, AT_5), AT_7),
        # The checkpoint of an orderly end that cannot be read leaves the shard nowhere.
        (Report(2, closed=LogPosition(2, 9), offers=[AT_5]), None),
        (Report(2, closed=LogPosition(1, 9), offers=[AT_7]), None),
    ],
)
def test_a_shard_stands_where_it_is_live_or_was_left(report: Report, place: CheckpointId | None) -> None:
    assert report.place == place


def test_a_decision_says_what_to_load() -> None:
    assert Decision(2, AT_7, initialized=True, live=True).target() == {"cut": AT_7, "live": True}
    assert Decision(1, None, initialized=False).target() == {"cut": None, "live": False}


@pytest.mark.parametrize(
    ("reports", "common"),
    [
        ([stored()], None),
        ([live(AT_7)], None),
        ([live(AT_7, AT_3, AT_5)], AT_5),
        ([stored(AT_3, AT_5), live(AT_7, AT_3)], AT_3),
        ([stored(AT_5), stored(AT_3)], None),
        ([closed(), closed()], AT_7),
    ],
)
def test_a_checkpoint_is_common_where_every_shard_can_be_loaded_from_it(
    reports: list[Report], common: CheckpointId | None
) -> None:
    assert common_checkpoint(reports) == common


# All shards at one place


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("report", [live(), closed(), live(AT_7, AT_3)])
def test_shards_at_the_end_of_the_log_go_on_in_their_epoch(count: int, report: Report) -> None:
    assert decide(standing(), [report] * count) == Decision(2, AT_7, initialized=True, live=True)


def test_shards_that_are_live_and_shards_that_were_left_at_one_place_go_on_together() -> None:
    assert decide(standing(), [live(), closed(), live()]) == Decision(2, AT_7, initialized=True, live=True)


@pytest.mark.parametrize("behind", [AT_5, CheckpointId(1, 20, 20)])
def test_live_shards_go_on_where_redis_has_gone_back(behind: CheckpointId) -> None:
    assert decide(standing(behind), [live()] * 2) == Decision(2, AT_7, initialized=True, live=True)


def test_shards_that_were_left_do_not_go_on_where_redis_says_otherwise() -> None:
    assert decide(standing(AT_5), [closed(AT_7, AT_3)] * 2) == Decision(3, AT_7, initialized=True)


@pytest.mark.parametrize("report", [live(), closed()])
def test_shards_at_one_place_go_on_where_redis_has_lost_the_run(report: Report) -> None:
    assert decide(lost(), [report] * 3) == Decision(2, AT_7, initialized=True, live=True)


@pytest.mark.parametrize("lately", [{}, LOST])
def test_shards_that_wait_for_their_weights_go_on_waiting(lately: Mapping[str, Any]) -> None:
    waiting = Report(2, live=NOTHING)
    assert decide(standing(NOTHING, initialized=0, **lately), [waiting] * 2) == Decision(
        2, NOTHING, initialized=False, live=True
    )


def test_shards_of_which_one_has_no_weights_wait_for_them() -> None:
    reports = [live(NOTHING), Report(2, live=NOTHING)]
    decision = decide(standing(NOTHING, initialized=0), reports)
    assert decision == Decision(2, NOTHING, initialized=False, live=True)


# Not at one place, or not at the newest


def test_shards_behind_the_log_go_back_to_a_checkpoint_in_a_new_epoch() -> None:
    assert decide(standing(), [live(AT_5, AT_3)] * 2) == Decision(3, AT_3, initialized=True)


def test_shards_at_different_places_go_back_to_the_newest_checkpoint_of_all() -> None:
    reports = [live(AT_7, AT_3, AT_5), live(AT_5, AT_3, AT_5), stored(AT_3, AT_5, AT_7)]
    assert decide(standing(), reports) == Decision(3, AT_5, initialized=True)


def test_shards_without_state_are_read_from_the_newest_checkpoint() -> None:
    assert decide(standing(), [stored(AT_3, AT_5)] * 2) == Decision(3, AT_5, initialized=True)
    assert decide(lost(), [stored(AT_3, AT_5)] * 2) == Decision(3, AT_5, initialized=True)


def test_the_newest_checkpoint_is_that_of_the_newest_epoch() -> None:
    newer = CheckpointId(3, 1, 1)
    assert decide(standing(newer), [stored(AT_7, newer)] * 2) == Decision(4, newer, initialized=True)


@pytest.mark.parametrize(
    "reports",
    [
        [live(AT_7, AT_5), live(AT_7, AT_5, epoch=5)],
        [live(AT_7, AT_5), live(AT_7, AT_5, CheckpointId(5, 0, 0))],
    ],
)
def test_a_newer_epoch_that_anybody_knows_of_outdoes_the_state(reports: list[Report]) -> None:
    assert decide(standing(), reports) == Decision(6, AT_5, initialized=True)
    assert decide(lost(), reports) == Decision(6, AT_5, initialized=True)


def test_a_run_that_is_cut_anew_is_read_from_its_checkpoint() -> None:
    assert decide(standing(recut=1), [stored(AT_5, AT_7)] * 4) == Decision(3, AT_7, initialized=True)
    assert decide(standing(recut=1), [closed(AT_7, AT_5)] * 4) == Decision(3, AT_7, initialized=True)


def test_a_run_without_weights_that_is_cut_anew_begins_again() -> None:
    assert decide(standing(NOTHING, initialized=0, recut=1), [Report(2)] * 4) == Decision(2, None, initialized=False)


# Nothing there


def test_a_new_run_begins_in_the_epoch_it_was_given() -> None:
    new = standing(CheckpointId(4, 0, 0), initialized=0)
    assert decide(new, [Report(4), Report(0)]) == Decision(4, None, initialized=False)
    assert decide(new, [Report(0)]) == Decision(4, None, initialized=False)


@pytest.mark.parametrize("gone", [standing(), lost()])
def test_what_is_nowhere_begins_again_in_a_new_epoch(gone: RunView) -> None:
    assert decide(gone, [Report(2)] * 2) == Decision(3, None, initialized=False)


def test_a_run_without_checkpoints_that_lost_a_shard_begins_again() -> None:
    assert decide(standing(), [live(), Report(2)]) == Decision(3, None, initialized=False)
    assert decide(standing(), [live(AT_7), live(AT_5)]) == Decision(3, None, initialized=False)


# Waiting


@pytest.mark.parametrize(
    "reports",
    [
        # A checkpoint of which one shard's part is elsewhere.
        [stored(AT_5), stored()],
        [stored(AT_5), stored(AT_3)],
        [live(AT_7, AT_5), live(AT_5, AT_3)],
        [closed(AT_7), live(AT_5)],
    ],
)
@pytest.mark.parametrize("fields", [{}, {"durable": "2-5-6", "durable_step": 5}])
def test_what_some_shards_have_durably_is_not_given_up(reports: list[Report], fields: dict[str, Any]) -> None:
    for order in (reports, reports[::-1]):
        for each in (standing(**fields), lost(**fields)):
            with pytest.raises(Waiting):
                decide(each, order)


@pytest.mark.parametrize("reports", [[stored(), stored()], [live(AT_7), stored()]])
def test_what_redis_knows_to_be_durable_is_not_given_up(reports: list[Report]) -> None:
    with pytest.raises(Waiting):
        decide(standing(durable="2-5-6"), reports)


# Journals


def journaled(place: CheckpointId, *, repaired: bool = False) -> Report:
    return Report(2, initialized=True, live=place, offers=[AT_3], journaled=True, repaired=repaired)


@pytest.mark.parametrize(
    ("asked", "reports", "expected"),
    [
        # At one place, there is nothing to take.
        (None, [journaled(AT_7)], None),
        (None, [journaled(AT_7), journaled(AT_7)], None),
        # What one has, the others take; what a repair has given up, nobody can.
        (None, [journaled(AT_7), journaled(AT_5)], Exchange(1, 6)),
        ("1 6", [journaled(AT_7), journaled(AT_5)], Exchange(2, 6)),
        ("1 6", [journaled(AT_7), journaled(AT_7)], None),
        ("2 6", [journaled(AT_7), journaled(AT_5)], Exchange(3, 6)),
        ("3 6", [journaled(AT_7), journaled(AT_5)], None),
        (None, [journaled(AT_5, repaired=True)], Exchange(3, 6)),
        (None, [journaled(AT_5, repaired=True), journaled(AT_5)], Exchange(3, 6)),
        ("2 6", [journaled(AT_5, repaired=True), journaled(AT_7)], Exchange(3, 6)),
        # Without a journal there is no more than a checkpoint.
        (None, [journaled(AT_7), stored(AT_3)], None),
        (None, [journaled(AT_7), live(AT_5)], None),
        (None, [journaled(AT_7), journaled(CheckpointId(3, 5, 6))], None),
    ],
)
def test_what_shards_are_to_report_of_their_journals(
    asked: str | None, reports: list[Report], expected: Exchange | None
) -> None:
    given = {} if asked is None else {"exchange": asked}
    wanted = exchange(standing(**given), reports)
    assert wanted == expected
    assert wanted is None or wanted.goes_back == (wanted.round == 3)


def test_after_going_back_a_run_goes_on_from_the_checkpoint_of_then_in_a_new_epoch() -> None:
    # Redis knows of more, and the shards have left what they all have.
    assert decide(standing(AT_7), [stored(AT_3, AT_5), stored(AT_3, AT_5)]) == Decision(3, AT_5, initialized=True)
