"""The dashboard's modules, each by itself in a browser: what they make of events, curves and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page

from dashboard.page_parts import OpenPage
from harness import ThreadService
from meanwhile import DEADLINE_S

pytestmark = pytest.mark.slow

Run = Callable[..., Any]
NOW = 1_800_000_000_000


@pytest.fixture
def run(service: ThreadService, open_page: Callable[..., Page]) -> Run:
    """Runs statements with a module's names; they return what is asked."""
    page = open_page(service.url, signs_in=False)
    # By then it has been answered, of which it takes the service's time.
    page.get_by_label("Token").wait_for()

    def run_in_browser(module: str, statements: str, given: Any = None) -> Any:
        source = (
            f"async (given) => {{ const module = await import('/dashboard/files/{module}.js');"
            f" Date.now = () => {NOW}; {statements} }}"
        )
        return page.evaluate(source, given)

    return run_in_browser


def push(step: int, *, epoch: int = 1, time: int = NOW, **more: Any) -> dict[str, Any]:
    return {
        "kind": "push", "id": f"{epoch}-{step}", "epoch": epoch, "step": step, "time": time, "worker": "w",
        "decision": "applied", "reason": None, "staleness": 0, "loss": 1.0, "samples": 8, "units": {}, **more,
    }  # fmt: skip


def lease(number: int, change: str = "granted") -> dict[str, Any]:
    return {"kind": "lease", "id": f"1-0.{number}", "epoch": 1, "step": 0, "change": change, "worker": "w"}


@pytest.mark.parametrize(
    ("events", "is_live", "newest", "expected"),
    [
        ([push(1), push(2)], True, None, [NOW, NOW]),
        # Between a lease that says when, and now.
        ([lease(NOW - 4000), push(1), push(2)], False, None, [NOW - 4000, NOW - 2000, NOW]),
        ([push(1), lease(NOW - 50)], False, None, [NOW - 50, NOW - 50]),
        # Behind what was seen before an outage.
        ([push(1), push(2)], False, NOW - 1000, [NOW - 500, NOW]),
        # Pushes that came as one count as so many.
        ([lease(NOW - 4000), push(3, coalesced=3), push(4)], False, None, [NOW - 4000, NOW - 1000, NOW]),
        # The service's clock is ahead, or has gone back: what an id says is never moved.
        ([lease(NOW + 9000), push(1)], False, None, [NOW + 9000, NOW + 9000]),
        ([lease(NOW - 10), push(1), lease(NOW - 20)], False, None, [NOW - 10, NOW - 15, NOW - 20]),
    ],
)
def test_events_are_dated_by_those_that_say_when(
    run: Run, events: list[Any], is_live: bool, newest: int | None, expected: list[int]
) -> None:
    statements = "module.dateEvents(...given); return given[0].map((event) => event.time);"
    assert run("event_times", statements, [events, is_live, newest]) == expected


def test_events_are_dated_by_the_history(run: Run) -> None:
    steps = [{"epoch": 1, "step": 1, "time": NOW - 9000}, {"epoch": 1, "step": 3, "time": NOW - 1000}]
    statements = (
        "module.dateEvents(given[0], false, null, { steps: given[1] }, given[2]);"
        " return given[0].map((event) => event.time);"
    )
    events = [push(1), push(2), push(3), push(4)]
    assert run("event_times", statements, [events, steps, []]) == [NOW - 9000, NOW - 5000, NOW - 1000, NOW]
    assert run("event_times", statements, [events, steps, [push(2, time=NOW - 8000)]])[1] == NOW - 8000
    # The first one is between points, too, and one of many at a step is between steps.
    events = [push(2), push(2), push(2), push(3)]
    assert run("event_times", statements, [events, steps, []])[:2] == [NOW - 5000, pytest.approx(NOW - 11000 / 3)]
    # A point does not move an event behind one whose time is known.
    events = [push(1), push(2), {**lease(NOW - 6000), "id": f"1-2.{NOW - 6000}", "step": 2}, push(3)]
    assert run("event_times", statements, [events, steps, []]) == [NOW - 9000, NOW - 7500, NOW - 6000, NOW - 1000]


def test_many_old_events_are_dated_by_a_thinned_history(run: Run) -> None:
    """Of a point that stands for several observations, most have no event of just its step."""

    def time_of(step: int) -> int:
        # Slow, then fast, then slow again; the newest a minute ago.
        return NOW - 60_000 - 100 * (1200 - step) + (40 * (step - 300) if 300 < step < 900 else 24_000 * (step >= 900))

    shown = range(8, 1201, 8)
    nothing: dict[str, Any] = {"step": [], "epoch": [], "time": [], "count": [], "mean": []}
    applied = {
        "step": [*shown], "epoch": [1] * len(shown), "count": [8] * len(shown), "mean": [1] * len(shown),
        "time": [time_of(step) / 1000 for step in shown],
    }  # fmt: skip
    metric = {**nothing, "step": [1190], "epoch": [1], "time": [NOW / 1000 - 30], "count": [1], "mean": [1]}
    begun = {"epoch": 1, "step": 0, "time": time_of(0) / 1000}
    history = {"curves": {"applied": applied}, "metrics": {"accuracy": metric}, "epochs": [begun]}
    report = {"kind": "metric", "id": "1-2000", "epoch": 1, "step": 1200, "name": "accuracy", "measured_at": 1190}
    # The page is told of the last 1,000 steps, and its history ends a minute before it is opened.
    events = [*map(push, range(203, 1201)), report]
    statements = (
        "const { timesOf } = await import('/dashboard/files/run_history.js');"
        " module.dateEvents(given[1], false, null, timesOf(given[0])); return given[1].map((event) => event.time);"
    )
    *times, reported = run("event_times", statements, [history, events])
    assert reported == NOW - 30_000
    assert times == sorted(times)
    # Between two points they are spread evenly, so that nothing is faster than the history.
    for step, time in zip(range(203, 1201), times, strict=True):
        begin = step - step % 8
        share = (step - begin) / 8
        expected = time_of(begin) + share * (time_of(min(1200, begin + 8)) - time_of(begin))
        assert time == pytest.approx(expected, abs=1)


def test_an_average_is_right_from_its_beginning(run: Run) -> None:
    assert run("series", "return module.smoothed([4, 4, 4], 0.9);") == pytest.approx([4, 4, 4])
    assert run("series", "return module.smoothed([1, 2, 3], 0);") == [1, 2, 3]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], None),
        ([0.5] * 10 + [1e23] * 300, {"newest": pytest.approx(1e23), "best": 0.5}),
        # One push alone, one that was lucky, and one that began worse.
        ([0.5] * 300 + [5.0], None),
        ([2.0] * 50 + [0.00001] + [2.0] * 50, None),
        ([1e9] * 5 + [0.5] * 300 + [1e3] * 300, None),
        # Losses may be below 0.
        ([-1.0] * 50 + [-0.5] * 300, None),
    ],
)
def test_a_loss_runs_away(run: Run, losses: list[float], expected: dict[str, float] | None) -> None:
    points = [{"step": step, "time": step, "value": loss, "count": 1} for step, loss in enumerate(losses)]
    assert run("series", "return module.runaway(given);", points) == expected


def test_rates_are_over_stretches(run: Run) -> None:
    points = [{"step": step, "time": 400 * step, "value": step} for step in range(11)]
    found = run("series", "return module.rates(given, 1000);", points)
    assert {point["value"] for point in found} == {2.5} and len(found) == 3
    # A run that goes back is no negative rate.
    back = [*points, {"step": 2, "time": 9000, "value": 2}, {"step": 6, "time": 11000, "value": 6}]
    assert [point["value"] for point in run("series", "return module.rates(given, 1000);", back)][-1] == 2


def test_a_series_is_bounded_and_keeps_its_ends(run: Run) -> None:
    statements = (
        "const series = new module.Series();"
        " for (let step = 0; step < 50000; step += 1) series.add(step, step, 1);"
        " return [series.points.length, series.last.step, series.points.every((point) => point.value === 1)];"
    )
    length, last, is_flat = run("series", statements)
    assert length <= 20000 and last == 49999 and is_flat


def test_a_thinned_past_and_what_is_new_have_the_same_noise(run: Run) -> None:
    statements = (
        "const record = new module.RunRecord(); record.begin(given[0]);"
        " given[1].forEach((event) => record.take(event));"
        " const { evened } = await import('/dashboard/files/series.js');"
        " return [record.loss, record.metric('m')]"
        ".map((each) => evened(each.points).map(({ step, value, count }) => [step, value, count]));"
    )
    past = {
        "loss": [
            {"step": step, "time": NOW, "value": 2, "count": count} for step, count in ((4, 4), (5, 1), (9, 4), (10, 1))
        ],
        "milestones": [], "staleness": [], "steps": [], "decided": {}, "metrics": [["m", [
            {"step": 3, "time": NOW, "value": 1, "count": 1}
        ]]],
    }  # fmt: skip
    # A loss of 0 and 8 by turns is one of 4 in groups of four.
    events = [push(step, loss=8 * (step % 2)) for step in range(11, 19)]
    loss, metric = run("run_record", statements, [past, events])
    assert loss == [[4, 2, 4], [9, 2, 5], [13, pytest.approx(4.5), 4], [17, 4, 4], [18, 0, 1]]
    assert metric == [[3, 1, 1]]


def test_a_record_goes_back_with_its_run(run: Run) -> None:
    events = [
        *(push(step) for step in range(1, 6)),
        push(5, decision="dropped", reason="stale", staleness=9),
        {**lease(1), "step": 2, "time": NOW},
        {**lease(2, "expired"), "step": 5, "time": NOW},
        {"kind": "epoch", "id": "2-5", "epoch": 2, "step": 2, "time": NOW},
        push(3, epoch=2, coalesced=4),
    ]
    statements = (
        "const record = new module.RunRecord(); given.forEach((event) => record.take(event));"
        " return [record.step, record.loss.points.map((point) => point.step), record.decisions,"
        " [...record.reasons], record.workers.get('w').pushes,"
        " record.marks.map((mark) => [mark.kind, mark.isGivenUp ?? false])];"
    )
    step, steps, decisions, reasons, pushes, marks = run("run_record", statements, events)
    assert (step, steps) == (3, [1, 2, 3])
    assert decisions == {"applied": 9, "accumulated": 0, "dropped": 1}
    assert (reasons, pushes) == ([["dropped: stale", 1]], 10)
    # What happened at steps that it gave up stays known, and lies over no step.
    assert marks == [["join", False], ["kill", True], ["epoch", False]]


def test_a_replay_has_what_came_before_the_events_that_are_kept(run: Run) -> None:
    statements = (
        "let forgotten = 0;"
        " const forgot = (count) => { forgotten += count; };"
        " const feed = new module.RunFeed('r', { changed: () => {}, forgot });"
        " const of = (step) => ({ ...given[0], step, id: `1-${step}`, worker: `w-${step % 2}` });"
        " feed.hear([given[1], ...Array.from({ length: 23000 }, (_, index) => of(index + 1))], true);"
        " const seen = (record) => [record.step, record.decisions.applied, record.loss.last.step,"
        " record.workers.get('w-0').pushes, record.metric('m').points.length, record.marks.length];"
        " const first = seen(feed.replayed(0));"
        " const last = seen(feed.replayed(feed.events.length));"
        " return [forgotten, first, last, seen(feed.record), seen(feed.replayed(0))];"
    )
    metric = {"kind": "metric", "id": "1-0", "epoch": 1, "step": 0, "name": "m", "value": 1.0, "measured_at": 0}
    forgotten, first, last, whole, again = run("run_feed", statements, [push(1), metric])
    assert forgotten == 3001
    assert first == again == [3000, 3000, 3000, 1500, 1, 0]
    assert last[:2] == whole[:2] == [23000, 23000] and last[2:] == whole[2:]


def test_workers_that_have_gone_are_forgotten_in_the_end(run: Run) -> None:
    statements = (
        "const record = new module.RunRecord();"
        " const told = (time, worker, change) => record.take({ ...given, id: `1-0.${time}`, worker, change, time });"
        " told(0, 'stays', 'granted');"
        " for (let number = 1; number < 3000; number += 1) {"
        " told(number, `w-${number}`, 'granted'); told(number, `w-${number}`, 'expired'); }"
        " return [record.workers.size, ...['stays', 'w-1', 'w-2999'].map((name) => record.workers.has(name))];"
    )
    assert run("run_record", statements, lease(1)) == [1000, True, False, True]


def test_a_history_goes_before_the_first_event(run: Run) -> None:
    def curve(steps: list[int], epochs: list[int], means: list[float]) -> dict[str, Any]:
        times = [NOW / 1000 + number for number in range(len(steps))]
        return {"step": steps, "epoch": epochs, "time": times, "count": [2] * len(steps), "mean": means}

    names = ("loss", "staleness", "applied", "accumulated", "dropped")
    history = {
        # Steps 4 and 6 were given up when epoch 2 began with step 2.
        "curves": {name: curve([2, 4, 6, 3, 8], [1, 1, 1, 2, 2], [1, 0.5, 1, 1, 1]) for name in names},
        "metrics": {"accuracy": curve([2, 8], [1, 2], [0.1, 0.2])},
        "epochs": [{"epoch": 1, "step": 0, "time": 0}, {"epoch": 2, "step": 2, "time": 0}],
    }
    statements = (
        "const past = module.historyBefore(given[0], given[1], []);"
        " const steps = (points) => points.map((each) => each.step);"
        " return [steps(past.loss), past.decided.applied.map((each) => each.value), steps(past.metrics[0][1])];"
    )
    assert run("run_history", statements, [history, push(8, epoch=2)]) == [[2, 3], [2, 4], [2]]
    assert run("run_history", "return module.historyBefore(null, given, []);", push(1)) is None
    # One that says when it was is behind a push of its own step.
    opened = {"kind": "epoch", "id": f"2-9.{NOW + 9000}", "epoch": 2, "step": 8}
    assert run("run_history", statements, [history, opened])[0] == [2, 3, 8]
    assert run("run_history", statements, [history, {**opened, "id": f"2-9.{NOW}"}])[0] == [2, 3]


def test_milestones_count_once_beside_the_events(run: Run) -> None:
    """A journal tells again of entries behind the checkpoint, and not of what had no entry."""
    begun, changed = {"kind": "epoch", "id": f"1-2.{NOW}"}, {"kind": "control", "id": "1-4"}
    lost = [lease(NOW - 9000), {**lease(NOW - 8000, "expired"), "id": f"1-3.{NOW - 8000}", "worker": "other"}]
    # In the order of their times, by a clock that went back.
    kept = [{"time": 1.5, "event": each} for each in (changed, *reversed(lost))]
    events = [begun, push(3), {**changed, "step": 3}, push(5)]
    statements = (
        "const milestones = module.milestonesOf({ milestones: given[0] });"
        " const told = given[1].map((each) => [...module.takeBefore(milestones, each), each]);"
        " return [told.flat().map((each) => each.id), told[0][0].time, milestones];"
    )
    ids, time, left = run("run_history", statements, [kept, events])
    assert ids == [lost[0]["id"], begun["id"], "1-3", lost[1]["id"], "1-4", "1-5"]
    assert (time, left) == (1500, [])


def test_a_record_begins_with_what_was_before_its_first_event(run: Run) -> None:
    nothing: dict[str, Any] = {"step": [], "epoch": [], "time": [], "count": [], "mean": []}
    curves = dict.fromkeys(("loss", "staleness", "applied", "accumulated", "dropped"), nothing)
    at = {"step": [4, 9], "epoch": [2, 2], "time": [1, 2], "count": [1, 1], "mean": [1, 1]}
    epochs = [{"epoch": 1, "step": 0, "time": 0}, {"epoch": 2, "step": 3, "time": 0.5}]
    history = {"curves": {**curves, "loss": at}, "metrics": {}, "epochs": epochs}
    milestones = [{**lease(NOW), "id": f"1-7.{NOW}", "step": 7, "time": NOW}]
    statements = (
        "const { historyBefore } = await import('/dashboard/files/run_history.js');"
        " const record = new module.RunRecord(); record.begin(historyBefore(...given)); record.take(given[1]);"
        " return [record.marks.map((mark) => mark.text), record.loss.points.map((point) => point.step)];"
    )
    marks, steps = run("run_record", statements, [history, push(9, epoch=2, loss=None), milestones])
    assert marks == ["epoch 1 goes on at step 0", "w joined", "epoch 2 goes on at step 3"]
    # Nothing of epoch 2 is lost by its beginning, and the event's own step is the event's.
    assert steps == [4]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", 1234567, "1,234,567"), ("count", None, "–"), ("short", 25_000_000, "25 M"), ("short", 804, "804"),
        ("number", 0.00012345, "1.23e-4"), ("number", 0.123456, "0.1235"), ("number", 0, "0"), ("steps", 6.5e-24, "0"),
        ("duration", 1500, "1.5 s"), ("duration", 250_000, "4 min 10 s"), ("bytes", 9848, "9.85 kB"),
        ("bytes", None, "–"),
    ],
)  # fmt: skip
def test_numbers_are_for_people(run: Run, name: str, value: float | None, expected: str) -> None:
    assert run("format", f"return module.{name}(given);", value) == expected


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        # The same up to rounding, as the average of a constant is.
        [0.7, 0.7000000000000001], [1e16, 1e16 + 2], [9007199254740991.0, 9007199254740990.0],
        [1e-30, 1], [5e-324, 1], [1.7e308, -1.7e308], [1e-300, 1e300], [0, 0], [-1, 0],
    ],
)  # fmt: skip
def test_any_values_are_drawn(service: ThreadService, open_page: OpenPage, values: list[float], is_log: bool) -> None:
    """Ticks that are no numbers apart, or of no numbers, are made without an end."""
    page = open_page(service.url, signs_in=False)
    page.evaluate(
        "async (given) => { const { Chart } = await import('/dashboard/files/chart.js');"
        " const [values, isLog] = given; const chart = new Chart('t'); document.body.append(chart.element);"
        " const points = values.map((value, step) => ({ step, time: step, value }));"
        " setTimeout(() => { chart.show({ x: 'step', isLog, lines: [{ label: 'l', colour: '--ink', points }] });"
        " setTimeout(() => { window.scale = chart.uplot.scales.y; }); }); }",
        [values, is_log],
    )
    page.wait_for_function("window.scale", timeout=1000 * DEADLINE_S)
    low, high = page.evaluate("[window.scale.min, window.scale.max]")
    assert math.isfinite(low) and math.isfinite(high) and low < high


def test_a_moment_of_another_day_says_which(run: Run) -> None:
    assert run("format", "return module.moment(given);", NOW) == run("format", "return module.clock(given);", NOW)
    assert run("format", "return module.moment(given);", NOW - 3 * 86_400_000).startswith("12 Jan ")


@pytest.mark.parametrize(
    ("given", "ahead"),
    [
        # An answer that was long under way, with a date up to two seconds old, says nothing of the clocks.
        ([[-9000, 9000]], 0),
        ([[-2000, 0]], 0),
        # Clocks that differ: the middle of what the date allows, until a date says otherwise.
        ([[3_600_000, 0]], 3_601_000),
        ([[3_600_000, 0], [3_598_000, 4000], [3_601_000, 0]], 3_601_000),
        ([[3_600_000, 0], [0, 0]], 1000),
        # A service behind a proxy that sends no date.
        ([[None, 0]], 0),
    ],
)
def test_an_answer_that_takes_long_moves_no_clock(run: Run, given: list[list[int | None]], ahead: int) -> None:
    """Of each answer: its date, from now, and how long it took."""
    statements = (
        "const { compareClocks, now } = module;"
        " compareClocks(Date.now(), Date.now());"
        " for (const [date, took] of given) compareClocks(date === null ? NaN : Date.now() + date, Date.now() - took);"
        " return now() - Date.now();"
    )
    assert run("session", statements, given) == ahead
