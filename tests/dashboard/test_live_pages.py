"""A run's page while the run trains: curves, workers, restarts, several processes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, expect

from dashboard.page_parts import OpenPage, Train, cell_of, chart, last_step, reaches, row_of, step_of
from freestep import Client
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from plain_calls import BODY, Api

pytestmark = pytest.mark.slow


def inked(drawn: Locator) -> int:
    """How many pixels of a chart's curve area have been drawn on."""
    count = drawn.locator("canvas").evaluate(
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
        ".reduce((sum, value, index) => sum + (index % 4 === 3 && value > 0 ? 1 : 0), 0)"
    )
    return int(count)


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
