"""A run's events as points of its curves."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from freestep.api.events import (
    CheckpointEvent,
    ControlEvent,
    EpochEvent,
    LeaseEvent,
    MetricEvent,
    PushEvent,
    RunEvent,
    UpdateEvent,
)
from freestep.integrations.curves import Curves


def push(step: int, decision: str = "applied", **members: object) -> PushEvent:
    told = {"worker": "w", "reason": None, "staleness": 0, "loss": None, "samples": None, "units": {}, **members}
    common = {"kind": "push", "id": f"1-{step}", "epoch": 1, "step": step, "decision": decision}
    return PushEvent.model_validate(common | told)


def other(kind: type[RunEvent], step: int, kind_name: str, /, **members: object) -> RunEvent:
    return kind.model_validate({"kind": kind_name, "id": f"1-{step}.1", "epoch": 1, "step": step, **members})


def made(curves: Curves, *events: RunEvent) -> list[tuple[int, Mapping[str, float]]]:
    return [tuple(point) for event in events for point in curves.points(event)]  # type: ignore[misc]


def test_an_update_has_what_all_its_pushes_told() -> None:
    points = made(
        Curves(),
        push(0, "accumulated", loss=1.0, samples=8.0, staleness=2),
        push(0, "dropped", loss=100.0, samples=100.0, staleness=9, reason="stale"),
        push(1, loss=2.0, samples=4.0),
        push(2),
    )
    assert points == [
        (
            1,
            {
                "run/pushes": 3,
                "run/dropped": 1,
                "run/staleness": 1.0,
                "train/loss": 1.5,
                "train/samples": 12,
            },
        ),
        (2, {"run/pushes": 1, "run/dropped": 0, "run/staleness": 0.0}),
    ]


def test_an_update_that_an_ended_lease_completes_is_a_point() -> None:
    points = made(Curves(), push(0, "accumulated", loss=1.0), other(UpdateEvent, 1, "update"))
    assert [(step, metrics["train/loss"]) for step, metrics in points] == [(1, 1.0)]


def test_pushes_that_became_one_event_are_counted() -> None:
    ((step, metrics),) = made(Curves(), push(5, coalesced=5, loss=1.0))
    assert (step, metrics["run/pushes"]) == (5, 5)


def test_what_is_no_push_is_a_point_of_its_own() -> None:
    points = made(
        Curves(),
        other(EpochEvent, 3, "epoch"),
        other(MetricEvent, 4, "metric", name="acc", value=0.5, measured_at=2),
        other(CheckpointEvent, 4, "checkpoint", written_epoch=1, written_step=3),
        other(LeaseEvent, 4, "lease", change="granted", worker="w"),
    )
    assert points == [(3, {"run/epoch": 1}), (2, {"eval/acc": 0.5}), (4, {"run/checkpoint_step": 3})]


def test_what_was_changed_is_a_point_of_its_numbers() -> None:
    changes = {
        "optimizer": {"lr": 0.25, "schedule": {"name": "linear"}},
        "paused": True,
        "aggregation": {"policy": "sync"},
    }
    worker = {"worker": "w", "ban": 60}
    points = made(
        Curves(),
        other(ControlEvent, 3, "control", by="me", changes=changes),
        other(ControlEvent, 4, "control", by="me", changes=worker),
    )
    assert points == [(3, {"control/optimizer/lr": 0.25, "control/paused": 1.0})]


def test_an_epoch_voids_what_was_gathered() -> None:
    curves = Curves()
    points = made(curves, push(4, "accumulated", loss=9.0), other(EpochEvent, 2, "epoch"), push(3, loss=1.0))
    assert [(step, metrics.get("train/loss")) for step, metrics in points] == [(2, None), (3, 1.0)]


def test_points_are_as_rare_as_wanted_and_have_all_pushes() -> None:
    points = made(Curves(every=4), *(push(step, loss=float(step)) for step in range(1, 10)))
    assert [(step, metrics["run/pushes"], metrics["train/loss"]) for step, metrics in points] == [
        (4, 4, 2.5),
        (8, 4, 6.5),
    ]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("cut", range(8))
def test_curves_go_on_where_they_were(every: int, cut: int) -> None:
    events = [push(step, "accumulated" if step % 2 else "applied", loss=float(step)) for step in range(1, 9)]
    first = Curves(every)
    parts = made(first, *events[:cut]) + made(Curves(every, first.gathered), *events[cut:])
    assert parts == made(Curves(every), *events)


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match="no state"):
        Curves(gathered={"tea": 1.0})
