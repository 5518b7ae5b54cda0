"""What a run's page shows of what happened before it was opened; replays of it, and other runs beside it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from dashboard.page_parts import OpenPage, Train, cell_of, chart, last_step, painted, reaches, row_of, step_of
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from plain_calls import BODY, Api

pytestmark = pytest.mark.slow


def test_what_happened_before_the_events_is_shown_once(
    start_process: Callable[..., ProcessService], connect: Callable[..., Api], open_page: OpenPage
) -> None:
    service = start_process()
    api = connect(service.url)
    api.create(lease_ttl_ms=3_600_000)
    lease = api.lease("gpu-1")
    api.http.delete(api.path(f"/leases/{api.lease('gpu-2')['lease']}"))
    for step in range(6):
        api.push(lease, step, Freestep_Loss="0.5")
        if step == 2:
            assert api.http.patch(api.path(), json={"optimizer": {"lr": 0.25}}).status_code == 200
    told = ("epoch 1 goes on at step 0", "gpu-1 joined", "gpu-2 left", "optimizer.lr = 0.25, by admin-token")
    before = open_page(service.url, f"#/runs/{api.run}")
    for text in told:
        expect(before.locator(".events")).to_contain_text(text)
    service.stop()
    service.start()
    # The service has forgotten the events of before.
    events = connect(service.url, api.run).http.get(api.path("/events"), params={"follow": "false"}).text
    assert "event: epoch" in events and "granted" not in events and "control" not in events
    after = open_page(service.url)
    # The history is asked for again where there is no answer.
    after.route("**/history", lambda route: route.abort(), times=1)
    after.get_by_role("link", name=api.run).click()
    for page in (before, after):
        expect(page.locator(".events")).to_contain_text("epoch 1 goes on at step 6")
        for text in told:
            expect(page.locator(".events li", has_text=text)).to_have_count(1)
    # Of a worker that has gone the end is known, and not its pushes.
    expect(row_of(after, "gpu-2")).to_have_attribute("data-state", "left")
    expect(cell_of(after, "gpu-2", "Pushes")).to_have_text("–")
    expect(row_of(after, "gpu-1")).to_have_count(0)
    # They lie over curves, but for those that are hidden.
    join, control, loss = "#1a7a4c", "#b8560b", chart(after, "Loss")
    # These are drawn over them: a checkpoint was written for the change.
    for kind in ("checkpoints", "leaves"):
        after.get_by_role("checkbox", name=kind).uncheck()
    wait_until(lambda: painted(loss, join), pause_s=0.1)
    wait_until(lambda: painted(loss, control), pause_s=0.1)
    after.get_by_role("checkbox", name="control").uncheck()
    wait_until(lambda: not painted(loss, control), pause_s=0.1)


def test_what_is_old_is_dated_by_the_history(api: Api, open_page: OpenPage) -> None:
    """A page that is opened late, into a run that was never started again: of its events, few say when they were."""
    api.create(lease_ttl_ms=3_600_000)
    lease, sent = api.lease("gpu-1"), [time.time()]
    # So many that a point of the history stands for several pushes.
    for step in range(1100):
        assert api.push(lease, step, body=BODY, Freestep_Loss="0.5").status_code == 200
        sent.append(time.time())
        if step == 500:
            assert api.http.patch(api.path(), json={"paused": False, "optimizer": {"lr": 0.25}}).status_code == 200
    history = api.http.get(api.path("/history")).json()
    per_point = max(history["curves"]["applied"]["count"])
    assert per_point > 1
    page = open_page(api.url, f"#/runs/{api.run}")
    expect(page.locator(".events")).to_contain_text("optimizer.lr = 0.25")
    changed = next(each["time"] for each in history["milestones"] if each["event"]["kind"] == "control")
    told = page.evaluate("(time) => new Date(1000 * time).toLocaleTimeString('en-GB')", changed)
    expect(page.locator(".events li", has_text="optimizer.lr = 0.25")).to_contain_text(told)
    found = page.evaluate(
        """async (run) => {
            const { RunFeed } = await import("/dashboard/files/run_feed.js");
            // A network that brings little at a time.
            const whole = window.fetch;
            window.fetch = async (path, how) => {
                const answer = await whole(path, how);
                if (!path.includes("follow=false")) return answer;
                return new Response(answer.body.pipeThrough(new TransformStream({
                    transform(bytes, to) {
                        for (let at = 0; at < bytes.length; at += 10000) to.enqueue(bytes.slice(at, at + 10000));
                    },
                })));
            };
            const feed = await new Promise((done) => {
                const made = new RunFeed(run, { changed: () => done(made) }).start();
            });
            feed.stop();
            return feed.events.filter((each) => each.kind === "push").map(({ step, time }) => [step, time / 1000]);
        }""",
        api.run,
    )
    assert [step for step, _ in found] == [*range(1, 1101)]
    # No push is further from its time than the points around it.
    for step, at in found:
        assert sent[max(0, step - 1 - per_point)] <= at + 0.002
        assert at - 0.002 <= sent[min(1100, step + per_point)]


def test_what_lies_in_a_gap_comes_from_the_history(api: Api, open_page: OpenPage) -> None:
    """A page that was away for longer than the service keeps events."""
    api.create(lease_ttl_ms=60_000)
    lease = api.lease("gpu-1")
    for step in range(20):
        api.push(lease, step, Freestep_Loss="0.5")
    page = open_page(api.url, f"#/runs/{api.run}")
    reaches(page, 20)
    found = page.evaluate(
        """async (run) => {
            const { RunFeed } = await import("/dashboard/files/run_feed.js");
            let changed;
            const next = () => new Promise((done) => { changed = done; });
            const feed = new RunFeed(run, { changed: () => changed() });
            const first = next();
            feed.start();
            await first;
            const again = next();
            feed.hear([{ kind: "gap", id: "1-9", epoch: 1, step: 5000, after: null, entries: null }], true);
            const isEmpty = feed.events.length === 0;
            await again;
            feed.stop();
            return [isEmpty, feed.record.marks.map((mark) => mark.kind), feed.record.step, feed.replayed(99).step];
        }""",
        api.run,
    )
    is_empty, kinds, *steps = found
    assert is_empty and "join" in kinds and "gap" not in kinds and steps == [20, 20]


def test_a_run_is_replayed_from_its_events(service: ThreadService, open_page: OpenPage, train: Train, run: str) -> None:
    train(service, run)
    page = open_page(service.url, f"#/runs/{run}")
    reaches(page, 30)
    page.get_by_label("Moment").focus()
    page.keyboard.press("Home")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(page.locator(".place")).to_contain_text("Event 5 of")
    wait_until(lambda: step_of(page) < 6, pause_s=0.1)
    loss = chart(page, "Loss")
    wait_until(lambda: last_step(loss) < 6, pause_s=0.1)
    # It plays to its end, and is live again.
    page.get_by_role("button", name="Replay").click()
    reaches(page, 10)
    page.get_by_role("button", name="Live").click()
    expect(page.locator(".place")).to_have_text("")
    reaches(page, 30)


def test_runs_are_compared(service: ThreadService, open_page: OpenPage, train: Train, run: str) -> None:
    train(service, run)
    train(service, f"{run}-other")
    page = open_page(service.url, f"#/runs/{run}")
    page.get_by_text("Compare").click()
    page.get_by_label(f"{run}-other").click()
    key = chart(page, "Loss").get_by_role("list", name="Lines")
    expect(key.get_by_role("listitem")).to_have_text([run, f"{run}-other"])
