"""The phases of a push: each is measured once, however often the push was in it."""

from __future__ import annotations

from freestep_service.runs.phases import Phases


def test_who_waits_twice_waits_in_one_phase() -> None:
    phases = Phases()
    for phase in ("queue", "admit", "queue", "receive"):
        phases.ended(phase)
    seconds = phases.seconds()
    assert list(seconds) == ["queue", "admit", "receive"]
    first, second = (ended - began for phase, began, ended in phases.ends if phase == "queue")
    assert seconds["queue"] == first + second
