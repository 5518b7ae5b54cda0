"""The dashboard in a real browser, while real runs train."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, expect

from forked import Script
from freestep import Client
from harness import TOKEN, ProcessService, ThreadService
from meanwhile import DEADLINE_S, wait_until
from plain_calls import BODY, Api, slug

pytestmark = pytest.mark.slow

OpenPage = Callable[..., Page]
Train = Callable[..., Script]
PHONE = {"width": 390, "height": 844}

expect.set_options(timeout=1000 * DEADLINE_S)


@pytest.fixture
def run() -> str:
    """The name of a run of the test's own."""
    return f"run-{uuid.uuid4().hex[:8]}"


def tile(page: Page, name: str) -> str:
    """The text of a tile of a run's page."""
    return page.locator(f".tile:has(dt:text-is('{name}')) dd").inner_text()


def step_of(page: Page) -> int:
    """The step that a run's page shows; 0 until it shows one."""
    text = tile(page, "Step").replace(",", "")
    return int(text) if text.isdigit() else 0


def reaches(page: Page, step: int) -> None:
    """Waits until a run's page shows a step, or a later one."""
    wait_until(lambda: step_of(page) >= step, pause_s=0.1)


def last_step(chart: Locator) -> int:
    """The step of the newest point of a chart, as it is told to screen readers."""
    label = chart.get_by_role("img").get_attribute("aria-label") or ""
    found = re.findall(r"at step ([\d,]+)", label)
    return int(found[-1].replace(",", "")) if found else 0


def chart(page: Page, title: str) -> Locator:
    return page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))


def inked(drawn: Locator) -> int:
    """How many pixels of a chart's curve area have been drawn on."""
    count = drawn.locator("canvas").evaluate(
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
        ".reduce((sum, value, index) => sum + (index % 4 === 3 && value > 0 ? 1 : 0), 0)"
    )
    return int(count)


def painted(drawn: Locator, colour: str) -> bool:
    """Whether a chart has pixels of just this colour, #rrggbb."""
    return bool(
        drawn.locator("canvas").evaluate(
            """(canvas, wanted) => {
                const { width, height } = canvas;
                // Of a canvas that is read often, Chromium warns.
                const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
                copy.drawImage(canvas, 0, 0);
                const { data } = copy.getImageData(0, 0, width, height);
                return data.some((_, at) => at % 4 === 0 && wanted.every((part, index) => data[at + index] === part));
            }""",
            [*bytes.fromhex(colour.removeprefix("#")), 255],
        )
    )


def row_of(page: Page, worker: str) -> Locator:
    return page.locator("table.workers tbody tr", has_text=worker)


def cell_of(page: Page, worker: str, column: str) -> Locator:
    """A worker's cell in a column."""
    names = page.locator("table.workers thead th").all_inner_texts()
    return row_of(page, worker).locator("th, td").nth(names.index(column))


def violations(page: Page) -> list[Any]:
    """What axe finds, by rule and element."""
    found = Axe().run(page).response["violations"]
    return [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]


# A run trains


def test_curves_grow_while_a_run_trains(service: ThreadService, open_page: OpenPage, train: Train, run: str) -> None:
    train(service, run)
    page = open_page(service.url)
    page.get_by_role("link", name=run).click()
    expect(page.get_by_role("heading", name=run)).to_be_visible()
    loss = chart(page, "Loss")
    wait_until(lambda: last_step(loss) > 0, pause_s=0.1)
    seen = last_step(loss)
    wait_until(lambda: last_step(loss) > seen + 10, pause_s=0.1)
    assert inked(loss) > 1000
    for title in ("Steps a second", "Staleness of pushes", "Pushes a second"):
        expect(chart(page, title).locator("canvas")).to_be_visible()
    page.get_by_label("Time").check()
    expect(loss.get_by_role("img")).to_have_attribute("aria-label", re.compile(r"at \d\d:\d\d:\d\d"))
    page.get_by_label("Log scale").check()
    assert inked(loss) > 1000
    with Client(service.url) as client:
        client.run(run).report("accuracy", 0.5, 1)
        expect(chart(page, "accuracy")).to_be_visible()


def test_the_row_of_a_killed_worker_changes_with_its_lease(
    service: ThreadService, open_page: OpenPage, train: Train, run: str
) -> None:
    train(service, run, "stays")
    killed = train(service, run, "dies")
    page = open_page(service.url, f"#/runs/{run}")
    for worker in ("stays", "dies"):
        expect(row_of(page, worker)).to_have_attribute("data-state", "live")
    killed.kill()
    # Its lease is for two seconds: it is coloured before that has ended, and then it is gone.
    expect(row_of(page, "dies")).to_have_attribute("data-state", re.compile("quiet|late|expired"))
    expect(row_of(page, "dies")).to_have_attribute("data-state", "expired")
    expect(row_of(page, "dies")).to_contain_text("expired")
    expect(row_of(page, "stays")).to_have_attribute("data-state", "live")
    expect(page.locator(".events")).to_contain_text("dies fell silent: its lease expired")


def test_a_workers_row_says_what_it_sends(
    service: ThreadService, connect: Callable[..., Api], open_page: OpenPage, train: Train, run: str
) -> None:
    train(service, run, "gpu-1", lease_ttl_ms=60_000)
    page = open_page(service.url, f"#/runs/{run}")
    expect(row_of(page, "gpu-1")).to_be_visible()
    # It says of no speed, and so it is that of its pushes.
    expect(cell_of(page, "gpu-1", "Steps/s")).to_have_text(re.compile(r"^(?!0$)[\d.,]+$"))
    expect(cell_of(page, "gpu-1", "Received")).to_have_text(re.compile(r"^[\d.]+ [kM]B$"))
    api = connect(service.url)
    api.create(lease_ttl_ms=60_000)
    lease = api.lease("gpu-2")
    for step in range(2):
        api.push(lease, step, Freestep_Speed="2.5")
    page = open_page(service.url, f"#/runs/{api.run}")
    expect(cell_of(page, "gpu-2", "Steps/s")).to_have_text("2.5")
    expect(cell_of(page, "gpu-2", "Received")).to_have_text(f"{2 * len(BODY)} B")


def test_the_page_goes_on_when_the_service_restarts(
    start_process: Callable[..., ProcessService], open_page: OpenPage, train: Train, run: str
) -> None:
    service = start_process()
    train(service, run, durability="journal", lease_ttl_ms=30_000)
    page = open_page(service.url, f"#/runs/{run}")
    reaches(page, 5)
    page.evaluate("window.stays = true")
    service.kill()
    expect(page.get_by_text("The service does not answer")).to_be_visible()
    seen = step_of(page)
    service.start()
    expect(page.get_by_text("The service does not answer")).to_be_hidden()
    reaches(page, seen + 10)
    loss = chart(page, "Loss")
    wait_until(lambda: last_step(loss) > seen + 10, pause_s=0.1)
    assert page.evaluate("window.stays")
    # One that is opened now has curves from the beginning, though the service has forgotten the events of then.
    again = open_page(service.url, f"#/runs/{run}")
    plot = chart(again, "Loss").get_by_role("img")
    expect(plot).to_have_attribute("aria-label", re.compile(r"^Loss. loss: \S+ at step 1,"))
    expect(page.get_by_text("Nothing: every push is on disk")).to_be_visible()


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


def test_a_run_that_does_not_exist_is_said_and_not_asked_for(service: ThreadService, open_page: OpenPage) -> None:
    page = open_page(service.url)
    page.clock.install()
    page.goto(f"{service.url}/#/runs/none-such")
    page.reload()
    expect(page.get_by_text("There is no run of this name")).to_be_visible()
    expect(page.get_by_role("button", name="Delete the run")).to_have_count(0)
    page.wait_for_load_state("networkidle")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    page.wait_for_load_state("networkidle")
    assert asked == []
    page.get_by_role("link", name="All runs").click()
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()


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


# Names


ATTACKS = ("<img src=x onerror=alert(1)>", '"><script>alert(2)</script>', "__proto__", "constructor", "${alert(3)}")


def test_names_are_text(api: Api, open_page: OpenPage) -> None:
    api.run = f"{api.run}--script.alert_1_.__proto__"
    api.create()
    for name in ATTACKS:
        lease = api.lease(name)
        assert api.push(lease, api.status()["step"], Freestep_Loss="1.0").status_code == 200
        report = {"name": name, "value": 1.0, "step": 0}
        assert api.http.post(api.path("/metrics"), json=report).status_code == 200
    page = open_page(api.url)
    page.get_by_role("link", name=api.run).click()
    for name in ATTACKS:
        expect(page.locator("table.workers tbody th", has_text=name)).to_have_text(name)
        expect(chart(page, name).locator("canvas")).to_be_visible()
        expect(page.locator(".events")).to_contain_text(f"{name} joined")
    assert page.locator("main img, main script, main svg image").count() == 0
    api.http.delete(api.path())


# Who may do what


def test_an_act_takes_a_second_click(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url, f"#/runs/{api.run}")
    checkpoints = page.get_by_role("region", name="Checkpoints").locator("tbody tr")
    expect(checkpoints).to_have_count(1)
    api.push(api.lease(), 0)
    asked: list[str] = []
    page.on("request", lambda request: request.method == "GET" or asked.append(request.url))
    page.get_by_role("button", name="Write a checkpoint").click()
    armed = page.get_by_role("button", name="Write one now?")
    expect(armed).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Write a checkpoint")).to_be_focused()
    page.keyboard.press("Enter")
    expect(armed).to_be_visible()
    assert not asked
    page.keyboard.press("Enter")
    expect(page.get_by_text("checkpoint of step 1 written")).to_be_visible()
    expect(checkpoints).to_have_count(2)
    # Back to the oldest.
    restore = checkpoints.last.get_by_role("button")
    restore.click()
    restore.click()
    expect(page.get_by_text("the run is back at step 0")).to_be_visible()
    expect(page.locator(".facts").first).to_contain_text("epoch 2")
    assert api.status()["epoch"] == 2


def twice(button: Locator) -> None:
    """Presses a button that asks, and then answers it."""
    made = button.element_handle()
    assert made is not None
    made.click()
    made.click()


def test_a_run_is_paused_and_goes_on(service: ThreadService, open_page: OpenPage, train: Train, run: str) -> None:
    train(service, run)
    page = open_page(service.url, f"#/runs/{run}")
    reaches(page, 3)
    twice(page.get_by_role("button", name="Pause", exact=True))
    expect(page.get_by_text("Paused: pushes are refused")).to_be_visible()
    expect(page.locator(".events")).to_contain_text("paused = true, by admin-token")
    with Client(service.url) as client:
        step = client.run(run).status().step
        twice(page.get_by_role("button", name="Resume"))
        expect(page.get_by_text("Paused: pushes are refused")).to_be_hidden()
        wait_until(lambda: client.run(run).status().step > step + 3)


def test_a_learning_rate_is_set(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url, f"#/runs/{api.run}")
    setting = page.locator(".setting", has=page.get_by_label("lr", exact=True))
    expect(setting.get_by_role("textbox")).to_have_value("0.5")
    # What is no value is not even asked for.
    setting.get_by_role("textbox").fill("much")
    setting.get_by_role("button").click()
    expect(page.get_by_role("alert").filter(has_text="much is no value")).to_be_visible()
    expect(setting.get_by_role("button")).to_have_text("Set")
    setting.get_by_role("textbox").fill("-1")
    twice(setting.get_by_role("button"))
    expect(page.get_by_role("alert").filter(has_text="lr")).to_be_visible()
    assert api.status()["control"]["optimizer"] == {}
    setting.get_by_role("textbox").fill("0.25")
    twice(setting.get_by_role("button"))
    expect(page.locator(".events")).to_contain_text("optimizer.lr = 0.25, by admin-token")
    assert api.status()["control"]["optimizer"]["lr"] == 0.25
    api.http.patch(api.path(), json={"aggregation": {"policy": "ringmaster"}})
    expect(page.locator(".facts").first).to_contain_text("ringmaster")


def test_a_loss_that_runs_away_is_said(api: Api, open_page: OpenPage) -> None:
    api.create(lease_ttl_ms=60_000)
    page = open_page(api.url, f"#/runs/{api.run}")
    lease, told = api.lease(), page.get_by_text("The loss is 1.00e+23, and was 0.5 at its best. To go back, restore")
    for step in range(3):
        api.push(lease, step, Freestep_Loss="0.5")
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    reaches(page, 3)
    expect(chart(page, "Loss").locator("canvas")).to_be_visible()
    expect(page.get_by_text("at its best")).to_have_count(0)
    for step in range(3, 200):
        api.push(lease, step, Freestep_Loss="1e23")
    expect(told).to_be_visible()
    assert api.http.post(api.path("/checkpoints/3/restore")).is_success
    expect(told).to_have_count(0)


def test_a_policy_is_set(api: Api, open_page: OpenPage) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 5})
    page = open_page(api.url, f"#/runs/{api.run}")
    fields = page.get_by_role("group", name="Aggregation")
    policy, batch = fields.get_by_label("policy", exact=True), fields.get_by_label("batch")
    expect(policy).to_have_value("buffered")
    expect(batch).to_have_value("5")
    policy.select_option("quorum")
    for given, refusal in (("", "needs a batch"), ("many", "is no value"), ("0", "batch")):
        batch.fill(given)
        twice(fields.get_by_role("button"))
        expect(page.get_by_role("alert").filter(has_text=refusal)).not_to_have_count(0)
    assert api.status()["control"]["aggregation"] == {}
    batch.fill("2")
    twice(fields.get_by_role("button"))
    expect(page.locator(".events")).to_contain_text(
        'aggregation.policy = "quorum", aggregation.batch = 2, by admin-token'
    )
    expect(page.locator(".facts").first).to_contain_text("quorum")
    assert api.status()["control"]["aggregation"] == {"policy": "quorum", "batch": 2}
    # Another one begins with its own values; what is chosen and not set stays as it is chosen.
    policy.select_option("ssp")
    expect(batch).to_have_value("")
    api.http.patch(api.path(), json={"aggregation": {"batch": 3}})
    expect(page.locator(".events")).to_contain_text("aggregation.batch = 3")
    policy.select_option("quorum")
    expect(batch).to_have_value("3")
    policy.select_option("ssp")
    fields.get_by_label("slack").fill("4")
    twice(fields.get_by_role("button"))
    expect(page.locator(".facts").first).to_contain_text("ssp")
    assert api.status()["control"]["aggregation"] == {"policy": "ssp", "batch": None, "slack": 4}
    # What somebody else sets is shown.
    api.http.patch(api.path(), json={"aggregation": {"policy": "ringmaster", "max_staleness": 8}})
    expect(policy).to_have_value("ringmaster")
    expect(fields.get_by_label("max_staleness")).to_have_value("8")


def test_the_rate_of_a_wrapped_optimizer_is_set(api: Api, open_page: OpenPage) -> None:
    api.create(optimizer={"algorithm": "schedule_free_wrapper", "base": {"algorithm": "sgd", "lr": 0.5}})
    page = open_page(api.url, f"#/runs/{api.run}")
    setting = page.locator(".setting", has=page.get_by_label("base.lr"))
    setting.get_by_role("textbox").fill("0.25")
    twice(setting.get_by_role("button"))
    expect(page.locator(".events")).to_contain_text("optimizer.base.lr = 0.25")
    assert api.status()["control"]["optimizer"]["base"]["lr"] == 0.25


def test_a_workers_lease_is_ended(api: Api, open_page: OpenPage) -> None:
    api.create()
    for worker in ("<b>one</b>/x", "two"):
        api.lease(worker)
    page = open_page(api.url, f"#/runs/{api.run}")
    twice(page.get_by_role("button", name="End: <b>one</b>/x"))
    expect(row_of(page, "<b>one</b>/x")).to_have_attribute("data-state", "ended")
    assert [worker["worker"] for worker in api.status()["workers"]] == ["two"]
    api.lease("<b>one</b>/x")
    twice(page.get_by_role("button", name="Ban 1 h: two"))
    expect(row_of(page, "two")).to_have_attribute("data-state", "ended")
    assert slug(api.http.post(api.path("/leases"), json={"worker": "two"})) == "worker-suspended"
    expect(page.locator(".refused")).to_contain_text("two gets no lease, for 59 min")
    twice(page.get_by_role("button", name="Lift: two"))
    expect(page.locator(".refused")).not_to_contain_text("two")
    api.lease("two")


def test_what_is_refused_is_said(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url, f"#/runs/{api.run}")
    page.get_by_label("Number of shards").fill("300")
    shards = page.locator("section", has=page.get_by_role("heading", name="Shards and their owners"))
    shards.get_by_role("button").click()
    shards.get_by_role("button").click()
    expect(page.get_by_role("alert").filter(has_text="shards")).to_be_visible()
    assert api.status()["shards"] == 1


def test_a_run_is_deleted_and_its_page_left(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url, f"#/runs/{api.run}")
    page.get_by_role("button", name="Delete the run").click()
    page.get_by_role("button", name=f"Delete {api.run}").click()
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    expect(page.get_by_role("link", name=api.run)).to_have_count(0)


def test_who_may_only_read_is_offered_no_acts(api: Api, open_page: OpenPage) -> None:
    api.create()
    api.lease()
    made = api.http.post("/v1/tokens", json={"name": "reader", "scope": "read", "runs": api.run}).json()
    page = open_page(api.url, signs_in=False)
    page.get_by_label("Token").fill("nonsense")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("a token is fst_")
    page.get_by_label("Token").fill(made["token"])
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name=api.run).click()
    expect(row_of(page, "worker")).to_be_visible()
    expect(page.locator("button.act")).to_have_count(0)
    # And not even this, once the token is revoked.
    api.http.delete(f"/v1/tokens/{made['id']}")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("its token is good no more")


def test_a_link_leaves_the_address_and_signs_in_once(service: ThreadService, open_page: OpenPage) -> None:
    with Client(service.url) as client:
        link = client.dashboard_link()
    page = open_page(service.url, signs_in=False)
    page.goto(link)
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    assert "sign-in" not in page.url
    again = open_page(service.url, signs_in=False)
    again.goto(link)
    expect(again.get_by_role("alert")).to_contain_text("the link is unknown here, was used, or has ended")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.evaluate("localStorage.getItem('freestep-session')") is None


def test_scripts_see_half_of_a_session(service: ThreadService, open_page: OpenPage) -> None:
    page = open_page(service.url)
    assert page.evaluate("document.cookie") == ""
    kept = page.evaluate("JSON.stringify(localStorage)")
    assert TOKEN not in kept
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")


def test_a_page_of_another_port_learns_no_token_and_does_nothing(api: Api, open_page: OpenPage) -> None:
    """Browsers take it for the same site, and send it the cookies of this host."""
    api.create()
    heard: list[str] = []

    class Evil(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Cookie", ""))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Evil) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = open_page(api.url).context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        how = {"method": "POST", "credentials": "include", "mode": "no-cors"}
        page.evaluate("([url, how]) => fetch(url, how).then(() => null)", [api.url + api.path("/checkpoints"), how])
        server.shutdown()
    cookie = next(each for each in heard if each)
    assert cookie.startswith("freestep-") and TOKEN not in cookie
    assert slug(httpx.get(f"{api.url}/v1/runs", headers={"Cookie": cookie})) == "unauthenticated"
    assert len(api.http.get(api.path("/checkpoints")).json()["checkpoints"]) == 1


# Replays and comparisons


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


# Everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 900}, PHONE], ids=["wide", "phone"])
def test_pages_are_accessible(api: Api, open_page: OpenPage, scheme: str, viewport: dict[str, int]) -> None:
    api.create(lease_ttl_ms=60_000)
    api.http.put(api.path("/data/train"), json={"length": 100, "unit": 10})
    lease = api.lease("gpu-1")
    for step in range(3):
        api.push(lease, step, Freestep_Loss=str(1 / (1 + step)))
    api.http.post(api.path("/metrics"), json={"name": "accuracy", "value": 0.5, "step": 2})
    api.http.delete(api.path(f"/leases/{api.lease('gpu-2')['lease']}"))
    signed_out = open_page(api.url, signs_in=False, color_scheme=scheme, viewport=viewport)
    signed_out.get_by_label("Token").wait_for()
    assert violations(signed_out) == []
    page = open_page(api.url, color_scheme=scheme, viewport=viewport)
    page.get_by_role("link", name=api.run).wait_for()
    assert violations(page) == []
    page.get_by_role("link", name=api.run).click()
    expect(row_of(page, "gpu-1")).to_be_visible()
    expect(row_of(page, "gpu-2")).to_contain_text("left")
    expect(chart(page, "accuracy")).to_be_visible()
    expect(page.get_by_role("heading", name="Data units")).to_be_visible()
    assert violations(page) == []
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_a_phone_shows_all_that_tables_have(api: Api, open_page: OpenPage) -> None:
    api.create(lease_ttl_ms=60_000)
    api.push(api.lease("a-worker-with-a-name-longer-than-a-phone-is-wide-0123456789"), 0)
    page = open_page(api.url, f"#/runs/{api.run}", viewport=PHONE)
    expect(page.get_by_role("button", name="Ban 1 h")).to_be_visible()
    expect(page.get_by_role("button", name="Restore step 0")).to_be_visible()
    expect(page.locator("table.shards")).to_contain_text("Applied")
    # Nothing has to be scrolled sideways, and no cell is cut.
    cut = page.evaluate(
        "[...document.querySelectorAll('.scroll, tbody th, tbody td, tbody button')].filter((each) => {"
        "  const { left, right } = each.getBoundingClientRect();"
        "  return left < 0 || right > innerWidth || each.scrollWidth > each.clientWidth + 1;"
        "}).map((each) => each.outerHTML)"
    )
    assert cut == []
    # Each number has its column's name above it.
    label = page.locator("table.shards tbody td").nth(1)
    assert label.evaluate("cell => getComputedStyle(cell, '::before').content") == '"Elements"'


def test_ticks_of_stalenesses_lie_beside_each_other(api: Api, open_page: OpenPage) -> None:
    api.create(lease_ttl_ms=60_000)
    lease = api.lease()
    for step in range(30):
        api.push(lease, 0 if step % 2 else step)
    page = open_page(api.url, f"#/runs/{api.run}", viewport=PHONE)
    expect(page.locator(".histogram .bin")).not_to_have_count(0)
    wait_until(lambda: page.locator(".histogram .bin").count() >= 10, pause_s=0.1)
    boxes = page.locator(".tick").evaluate_all(
        "ticks => ticks.filter((each) => each.textContent).map((each) => {"
        "  const range = document.createRange(); range.selectNodeContents(each);"
        "  const { left, right } = range.getBoundingClientRect(); return [left, right];"
        "})"
    )
    assert 2 < len(boxes) <= 8
    assert all(right < left for (_, right), (left, _) in pairwise(boxes))


def test_the_keyboard_reaches_everything(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url)
    page.get_by_role("link", name=api.run).wait_for()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.get_by_role("link", name=api.run).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=api.run, level=1)).to_be_visible()
    wanted = page.locator("main").locator("button:visible:enabled, input:visible, summary:visible").count()
    reached = page.evaluate(
        "[...document.querySelectorAll('main button, main input, main summary')]"
        ".filter(each => each.checkVisibility() && !each.disabled && each.tabIndex >= 0).length"
    )
    assert wanted == reached > 5


def test_the_theme_is_chosen_and_kept(api: Api, open_page: OpenPage) -> None:
    api.create()
    lease = api.lease()
    for step in range(3):
        api.push(lease, step, Freestep_Loss=str(1 / (1 + step)))
    page = open_page(api.url, f"#/runs/{api.run}", color_scheme="light")
    loss = chart(page, "Loss")

    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    def has_curves(colour: str) -> None:
        wait_until(lambda: loss.locator("canvas").count() > 0 and painted(loss, colour), pause_s=0.1)

    light = ground()
    has_curves("#2b5bd7")
    # Without a choice the system's changes are followed.
    page.emulate_media(color_scheme="dark")
    has_curves("#8fb0ff")
    assert ground() != light
    page.emulate_media(color_scheme="light")
    has_curves("#2b5bd7")
    page.get_by_role("button", name="Theme: auto").click()
    page.get_by_role("button", name="Theme: light").click()
    page.get_by_role("button", name="Theme: dark").wait_for()
    dark = ground()
    assert dark != light
    has_curves("#8fb0ff")
    page.reload()
    page.get_by_role("button", name="Theme: dark").wait_for()
    assert ground() == dark


# Several processes


def test_each_process_shows_runs_of_all(
    shared_nodes: Callable[..., list[ThreadService]], connect: Callable[..., Api], open_page: OpenPage
) -> None:
    first, second = shared_nodes(2)
    api = connect(first.url)
    api.create()
    lease = api.lease("gpu-1")
    for service in (first, second):
        page = open_page(service.url, f"#/runs/{api.run}")
        api.push(lease, api.status()["step"], Freestep_Loss="0.5")
        expect(row_of(page, "gpu-1")).to_be_visible()
        expect(page.locator(".events")).to_contain_text("gpu-1 joined")
        expect(chart(page, "Loss").locator("canvas")).to_be_visible()
