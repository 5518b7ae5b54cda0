"""Curves in a bounded number of points, and the history that events make of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freestep_service.domain.curves import Curve, Moment
from freestep_service.domain.events import Event, Place
from freestep_service.domain.history import HistoryCurves

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def curve_of(observations: Sequence[tuple[int, float]], most: int = 8) -> Curve:
    """A curve of values and of the epochs that they are of, a step and a second apart."""
    curve = Curve(most)
    for number, (epoch, value) in enumerate(observations):
        curve.add(Moment(number, epoch, float(number)), value)
    return curve


def thinned(curve: Curve, most: int) -> Curve:
    """A copy of at most so many points."""
    copy = curve.copy()
    copy.thin(most)
    return copy


def copied(history: HistoryCurves) -> HistoryCurves:
    """It as it comes back from storage."""
    return HistoryCurves.from_document(json.loads(json.dumps(history.to_document())))


@given(st.lists(st.tuples(st.integers(0, 1), FINITE), max_size=200))
def test_a_curve_is_bounded_and_loses_no_observation(steps: list[tuple[int, float]]) -> None:
    epoch, observations = 0, []
    for goes_back, value in steps:
        epoch += goes_back
        observations.append((epoch, value))
    curve = curve_of(observations)
    for each in (curve, thinned(curve, 3), thinned(curve, 1)):
        columns = each.columns()
        values = [value for _, value in observations]
        assert sum(columns["count"]) == len(values)
        assert each.per_point.bit_count() == 1
        assert all(0 < count <= each.per_point for count in columns["count"])
        ends = [int(step) for step in columns["step"]]
        assert ends == sorted(set(ends)) == [int(time) for time in columns["time"]]
        begin = 0
        for index, end in enumerate(ends):
            part = values[begin : end + 1]
            assert len(part) == columns["count"][index]
            assert (columns["min"][index], columns["max"][index]) == (min(part), max(part))
            assert columns["mean"][index] == pytest.approx(
                sum(value / len(part) for value in part), rel=1e-9, abs=1e-9 * max(map(abs, part))
            )
            assert columns["epoch"][index] == observations[end][0]
            begin = end + 1
        assert begin == len(values)
    assert len(curve) <= 8 and len(thinned(curve, 3)) <= 3 and len(thinned(curve, 1)) <= 1


def test_a_curve_doubles_what_a_point_stands_for() -> None:
    curve = curve_of([(1, float(number)) for number in range(8)])
    assert (len(curve), curve.per_point) == (8, 1)
    curve.add(Moment(8, 1, 8.0), 8.0)
    assert curve.per_point == 2
    assert curve.columns()["mean"] == [0.5, 2.5, 4.5, 6.5, 8.0]
    assert curve.columns()["count"] == [2, 2, 2, 2, 1]


def test_the_largest_numbers_stay_numbers() -> None:
    largest = 1.7e308
    curve = curve_of([(1, (-1) ** number * largest) for number in range(100)])
    assert all(abs(mean) <= largest for mean in curve.columns()["mean"])
    assert (min(curve.columns()["min"]), max(curve.columns()["max"])) == (-largest, largest)


def test_a_thinned_copy_leaves_the_curve_as_it_is() -> None:
    curve = curve_of([(1, float(number)) for number in range(8)])
    before = curve.columns()
    thinned(curve, 2).add(Moment(9, 1, 9.0), 1.0)
    assert curve.columns() == before


class Told:
    """A history, and events that it is told of, a tenth of a second apart."""

    def __init__(self) -> None:
        self.history = HistoryCurves()
        self.now = 1000.0
        self.seq = self.step = 0
        self.epoch = 1
        self.tell("epoch", number=1)

    def tell(self, kind: str, number: int = 0, replayed: bool = False, **members: Any) -> None:
        place = Place(self.epoch, self.seq, number)
        self.history.take(Event(kind, place, self.step, members), self.now, is_replayed=replayed)

    def push(self, decision: str = "applied", number: int = 0, replayed: bool = False, **members: Any) -> None:
        self.now += 0.125
        self.seq += not number
        self.step += decision == "applied"
        told = {"decision": decision, "staleness": 2, "loss": 0.5, "samples": 4.0, **members}
        self.tell("push", number, replayed, **told)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Steps and means of a curve."""
        columns = self.history.curves[name].columns()
        return list(zip(columns["step"], columns["mean"], strict=True))


@pytest.fixture
def told() -> Told:
    return Told()


def test_pushes_make_curves_by_what_they_give(told: Told) -> None:
    told.push()
    told.push("accumulated", loss=None)
    told.push("dropped", number=2, staleness=9)
    told.push(samples=None)
    assert told.curve("loss") == [(1, 0.5), (2, 0.5)]
    assert told.curve("staleness") == [(1, 2), (1, 2), (2, 2)]
    assert told.curve("samples") == [(1, 4), (1, 4)]
    assert [mean for _, mean in told.curve("applied")] == [1, 0, 0, 1]
    assert [mean for _, mean in told.curve("accumulated")] == [0, 1, 0, 0]
    assert [mean for _, mean in told.curve("dropped")] == [0, 0, 1, 0]


def test_the_speed_is_measured_over_a_second_at_least(told: Told) -> None:
    for _ in range(16):
        told.push()
    assert told.curve("steps_per_second") == [(8, 8.0), (16, 8.0)]
    told.now += 99.875
    told.push()
    assert told.curve("steps_per_second")[-1] == (17, 0.01)
    # A clock that goes back makes no speed.
    told.now -= 1000
    told.push()
    told.push()
    assert len(told.curve("steps_per_second")) == 3


def test_workers_are_noted_when_they_change_and_with_each_speed(told: Told) -> None:
    assert told.history.live(1, told.now)
    assert not told.history.live(1, told.now)
    for _ in range(8):
        told.push()
    assert told.history.live(3, told.now)
    assert told.curve("workers") == [(0, 1), (8, 1), (8, 3)]


def test_a_replay_counts_what_has_not_counted_and_tells_of_no_speed(told: Told) -> None:
    for _ in range(4):
        told.push()
    told.history = copied(told.history)
    told.seq = told.step = 2
    told.tell("epoch", number=3)
    for _ in range(20):
        told.push(replayed=True)
    assert [step for step, _ in told.curve("loss")] == list(range(1, 23))
    assert told.curve("steps_per_second") == []
    assert [each.epoch for each in told.history.epochs] == [1]


def test_an_epoch_begins_points_of_its_own(told: Told) -> None:
    told.push()
    told.push()
    told.epoch, told.step = 2, 1
    told.tell("epoch", number=4)
    told.push()
    columns = told.history.curves["loss"].columns()
    assert list(zip(columns["epoch"], columns["step"], strict=True)) == [(1, 1), (1, 2), (2, 2)]
    assert [each[:2] for each in told.history.epochs] == [(0, 1), (1, 2)]


def test_what_is_kept_is_bounded(told: Told) -> None:
    for number in range(700):
        told.epoch += 1
        told.tell("epoch", number=number + 1)
        told.now += 1
        told.seq += 1
        told.tell("metric", name=f"m{number % 100}", value=1.0, measured_at=0)
        told.push()
    assert len(told.history.epochs) == 256
    assert sorted(told.history.metrics) == sorted(f"m{number % 100}" for number in range(636, 700))
    assert all(len(curve) <= 512 for curve in told.history.curves.values())


def test_a_history_comes_back_as_it_was_and_nothing_else_does(told: Told) -> None:
    for _ in range(600):
        told.push()
    told.tell("metric", number=7, name="acc[,]", value=0.25, measured_at=3)
    told.history.live(2, told.now)
    document = json.loads(json.dumps(told.history.to_document()))
    assert json.loads(json.dumps(copied(told.history).to_document())) == document
    loss = document["curves"]["loss"]
    for wrong in (
        {},
        {**document, "place": [1]},
        {**document, "place": None},
        {**document, "now": [1, 2, "x"]},
        {**document, "epochs": 3},
        {**document, "curves": []},
        {**document, "curves": {"loss": {**loss, "mean": "AAAA"}}},
        {**document, "curves": {"loss": {**loss, "mean": "?"}}},
        {**document, "curves": {"loss": {**loss, "per_point": 0}}},
        {**document, "curves": {"loss": {**loss, "step": ""}}},
        {**document, "metrics": {"acc": {**loss, "time": loss["time"][:-12] + "AAAAAADwfw=="}}},
        {**document, "milestones": []},
        {**document, "milestones": {"lease": [[1.0]]}},
        {**document, "milestones": {"lease": [[1.0, "{}"]]}},
        {**document, "milestones": {"lease": [["x", '{"kind": "lease"}']]}},
        {**document, "milestones": {"lease": [[1.0, '{"kind": "data"}']]}},
        {**document, "milestones": {"lease": [[float("nan"), '{"kind": "lease"}']]}},
    ):
        with pytest.raises(ValueError):
            HistoryCurves.from_document(wrong)


def test_curves_of_another_version_are_left_out(told: Told) -> None:
    told.push()
    document = told.history.to_document()
    document["curves"]["luck"] = document["curves"].pop("samples")
    read = HistoryCurves.from_document(json.loads(json.dumps(document)))
    assert "luck" not in read.curves
    assert len(read.curves["samples"]) == 0 and len(read.curves["loss"]) == 1
