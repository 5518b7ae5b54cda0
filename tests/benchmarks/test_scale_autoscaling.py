"""The rule that scales workers, and what Kubernetes makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.scale.autoscaling import Hpa, Observed, Targets, scaled, wanted
from benchmarks.scale.rules import Desk, opened_desk
from benchmarks.scale.setup import Costs, Setup

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "freestep"
TARGETS = Targets(most=64)
ROOMY = Observed(workers=8, busy=0.3, staleness=4.0, push_s=0.1, units=None)


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with opened_desk() as made:
        yield made


@pytest.mark.parametrize(
    ("observed", "number"),
    [
        (ROOMY, 16),
        (replace(ROOMY, busy=0.5), 10),
        (replace(ROOMY, busy=0.58), 8),
        (replace(ROOMY, staleness=64.0), 4),
        (replace(ROOMY, staleness=20.0), 7),
        (replace(ROOMY, push_s=2.5), 7),
        (replace(ROOMY, units=3), 3),
        (replace(ROOMY, units=0), 0),
        (Observed(8, None, None, None, None), 8),
        (Observed(8, 0.0, 0.0, 0.1, None), 16),
    ],
    ids=[
        "idle: twice, at most",
        "busy, below its target",
        "within the tolerance",
        "very stale: half, at least",
        "stale",
        "long waits",
        "few units left",
        "none left",
        "nothing was pushed",
        "fresh",
    ],
)
def test_the_fullest_of_three_says_how_many_are_wanted(observed: Observed, number: int) -> None:
    assert wanted(observed, TARGETS) == number


def after(hpa: Hpa, workers: int, asked: list[int]) -> list[int]:
    """How many workers there are after each look."""
    found = []
    for number, each in enumerate(asked):
        workers = hpa.next(Hpa.EVERY_S * number, workers, each)
        found.append(workers)
    return found


def test_a_larger_number_has_to_be_wanted_for_a_minute_and_doubles_once_a_minute() -> None:
    assert after(Hpa(TARGETS), 4, [4, *[40] * 14]) == [4, 4, 4, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 32, 32]


def test_a_smaller_number_has_to_be_wanted_for_as_long_as_the_chart_says() -> None:
    found = after(Hpa(replace(TARGETS, scale_in_s=60.0)), 16, [16, *[1] * 14])
    assert found == [16, 16, 16, 16, 16, 8, 8, 8, 8, 4, 4, 4, 4, 2, 2]


def test_numbers_stay_within_the_chart_s() -> None:
    assert max(after(Hpa(TARGETS), 60, [500] * 20)) == 64
    assert min(after(Hpa(replace(TARGETS, least=3, scale_in_s=0.0)), 6, [0] * 30)) == 3


@pytest.mark.slow
def test_workers_come_while_there_is_room_and_every_unit_counts(desk: Desk) -> None:
    costs = Costs(loop_push=0.05, loop_byte=0.0, update_parameter=0.0, redis_push=0.0)
    setup = Setup(1, 1, costs, compute_s=5.0, units=800, speed_sigma=0.1)
    found = scaled(setup, desk, 4 * 3600.0, Targets(most=64))
    numbers = [look.workers for look in found.looks]
    assert numbers[0] == 1 and max(numbers) > 8
    # n workers are n - 1 stale, so the target of 16 is what ends the growth, but for the steps of the controller.
    assert max(numbers) < 40
    assert found.outcome.units_done == 800 == found.outcome.applied
    # One worker alone would take 5 s for each.
    assert found.seconds < 800 * 5.0 / 4


def test_the_rule_is_the_chart_s() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["workers"]["autoscaling"]
    targets = Targets()
    assert (values["targetBusy"], values["targetStaleness"], values["targetPushSeconds"], values["scaleInSeconds"]) == (
        targets.busy,
        targets.staleness,
        targets.push_s,
        targets.scale_in_s,
    )
    template = (CHART / "templates" / "autoscaling.yaml").read_text()
    for line in (
        f"pollingInterval: {Hpa.EVERY_S:.0f}",
        f"stabilizationWindowSeconds: {Hpa.OUT_WINDOW_S:.0f}",
        f"value: {Hpa.OUT_PERCENT}, periodSeconds: {Hpa.STEP_S:.0f}",
        f"value: {Hpa.IN_PERCENT}, periodSeconds: {Hpa.STEP_S:.0f}",
        "clamp_min(",
        "{{ .targetBusy }} / max(sum by (instance) (rate(freestep_push_phase_seconds_sum",
        "{{ .targetStaleness }} / (sum(rate(freestep_staleness_steps_sum",
        "{{ .targetPushSeconds }} / (sum(rate(freestep_push_seconds_sum",
        "> 0) or vector(1),",
        "0.5, 2\n",
        "[2m]",
    ):
        assert line in template
