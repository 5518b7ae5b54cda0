"""Pages that are open for long: runs that go and come back, a service that is silent, clocks that differ, many runs."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import Page, expect

from dashboard.page_parts import OpenPage, chart, reaches, row_of
from meanwhile import wait_until
from plain_calls import Api

pytestmark = pytest.mark.slow


def refused_once(page: Page, path: str) -> None:
    """Has the next answer to a path be a refusal that passes."""
    body = json.dumps({"type": "urn:freestep:problem:overloaded", "detail": "later"})
    page.route(f"**{path}", lambda route: route.fulfill(status=503, body=body), times=1)


def hold(page: Page, url: re.Pattern[str]) -> None:
    """Has requests find nobody, as where a network loses all."""
    page.route(url, lambda _: None)


def push(api: Api, steps: range, lease: dict[str, object]) -> None:
    for step in steps:
        assert api.push(lease, step, Freestep_Loss=str(1 / (1 + step))).is_success


def test_a_run_that_is_deleted_is_said_until_there_is_another(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url, f"#/runs/{api.run}")
    facts = page.locator(".facts").first
    expect(facts).to_contain_text("sgd_schedule_free")
    api.http.delete(api.path())
    expect(facts).to_contain_text("not there any more")
    facts.evaluate(
        "facts => { window.changes = 0;"
        " new MutationObserver(() => { window.changes += 1; }).observe(facts, { childList: true }); }"
    )
    for _ in range(2):
        with page.expect_response(lambda answer: answer.url.endswith(f"/{api.run}") and answer.status == 404):
            pass
    assert page.evaluate("window.changes") == 0
    api.create()
    expect(facts).to_contain_text("sgd_schedule_free")


def test_a_silent_service_is_said_and_asked_again(api: Api, open_page: OpenPage) -> None:
    api.create(lease_ttl_ms=60_000)
    lease = api.lease()
    push(api, range(3), lease)
    page = open_page(api.url)
    page.clock.install()
    hold(page, re.compile(f"/{api.run}(/events.follow=true)?$"))
    followed: list[str] = []
    page.on("request", lambda request: request.url.endswith("follow=true") and followed.append(request.url))
    page.goto(f"{api.url}/#/runs/{api.run}")
    expect(chart(page, "Loss").locator("canvas")).to_be_visible()
    wait_until(lambda: len(followed) == 1, pause_s=0.1)
    page.clock.fast_forward(31_000)
    expect(page.get_by_text("The service does not answer")).to_be_visible()
    page.clock.fast_forward(10_000)
    page.unroute_all()
    expect(page.get_by_text("The service does not answer")).to_be_hidden()
    push(api, range(3, 6), lease)
    reaches(page, 6)
    expect(chart(page, "Loss").get_by_role("img")).to_have_attribute("aria-label", re.compile("at step 6"))
    assert len(followed) > 1


def test_what_is_refused_for_now_is_asked_again(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url)
    refused_once(page, "/dashboard/session")
    refused_once(page, f"/v1/runs/{api.run}/history")
    with page.expect_response(lambda answer: answer.url.endswith("/history") and answer.ok):
        page.goto(f"{api.url}/#/runs/{api.run}")
        page.reload()
    expect(page.get_by_role("heading", name=api.run)).to_be_visible()
    expect(page.get_by_text("later")).to_be_hidden()


def test_times_are_by_the_clock_of_the_service(api: Api, open_page: OpenPage) -> None:
    api.create(lease_ttl_ms=60_000)
    push(api, range(3), api.lease("gpu-1"))
    page = open_page(api.url)
    page.clock.install(time=datetime.now(UTC) + timedelta(hours=3))
    page.goto(f"{api.url}/#/runs/{api.run}")
    page.reload()
    checkpoints = page.get_by_role("region", name="Checkpoints").locator("tbody tr")
    expect(checkpoints.locator("td").nth(1)).to_have_text(re.compile(r"^[\d.]+ (s|min \d+ s) ago$"))
    expect(row_of(page, "gpu-1")).to_be_visible()


def test_beside_many_runs_a_page_goes_on(api: Api, open_page: OpenPage) -> None:
    """Browsers have six connections for a host."""
    first = api.run
    names = [first, *(f"{first}-{number}" for number in range(7))]
    leases = {}
    for name in names:
        api.run = name
        api.create(lease_ttl_ms=60_000)
        leases[name] = api.lease()
        push(api, range(3), leases[name])
    page = open_page(api.url, f"#/runs/{first}?with={'&with='.join(names[1:])}")
    key = chart(page, "Loss").get_by_role("list", name="Lines")
    expect(key.get_by_role("listitem")).to_have_count(len(names))
    for name in (first, names[-1]):
        api.run = name
        push(api, range(3, 6), leases[name])
        label = re.compile(rf"{name}: \S+ at step 1, \S+ at step 6")
        expect(chart(page, "Loss").get_by_role("img")).to_have_attribute("aria-label", label)
    reaches(page, 6)
    for name in names:
        api.run = name
        api.http.delete(api.path())


def test_a_curve_is_looked_at_closer_while_it_grows(api: Api, open_page: OpenPage) -> None:
    api.create(lease_ttl_ms=60_000)
    lease = api.lease()
    push(api, range(100), lease)
    page = open_page(api.url, f"#/runs/{api.run}")
    loss = chart(page, "Loss")
    expect(loss.get_by_role("img")).to_have_attribute("aria-label", re.compile("at step 100"))
    area = loss.locator(".u-over")
    width = area.evaluate("each => each.clientWidth")
    place = {"x": 2, "y": 40}

    def first() -> int:
        """The step at the left end."""
        area.hover(position={"x": width / 2, "y": 60})
        area.hover(position=place)
        return int(re.findall(r"at step (\d+)", loss.locator(".readout").inner_text())[-1])

    wait_until(lambda: first() <= 2, pause_s=0.1)
    area.hover(position={"x": 0.5 * width, "y": 40})
    page.mouse.down()
    area.hover(position={"x": 0.7 * width, "y": 40})
    page.mouse.up()
    wait_until(lambda: 45 <= first() <= 55, pause_s=0.1)
    push(api, range(100, 105), lease)
    expect(loss.get_by_role("img")).to_have_attribute("aria-label", re.compile("at step 105"))
    assert 45 <= first() <= 55
    area.dblclick(position=place)
    wait_until(lambda: first() <= 2, pause_s=0.1)


def test_a_new_run_has_no_past_of_an_old_one(api: Api, open_page: OpenPage) -> None:
    api.create(lease_ttl_ms=60_000)
    push(api, range(10), api.lease())
    page = open_page(api.url)
    line = page.locator(".run", has=page.get_by_role("link", name=api.run)).locator("polyline")
    expect(line).to_have_attribute("points", re.compile(r"\d"))
    api.http.delete(api.path())
    api.create(lease_ttl_ms=60_000)
    expect(line).to_have_attribute("points", "")
