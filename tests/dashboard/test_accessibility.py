"""Pages for everybody: by keyboard, for screen readers, on a phone, in the dark."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from dashboard.page_parts import PHONE, OpenPage, chart, painted, row_of
from meanwhile import wait_until
from plain_calls import Api

pytestmark = pytest.mark.slow


def violations(page: Page) -> list[Any]:
    """What axe finds, by rule and element."""
    found = Axe().run(page).response["violations"]
    return [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]


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
    # The link at the top leads to the content of this page.
    page.get_by_role("link", name="Skip to the content").focus()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    assert page.url.endswith(f"#/runs/{api.run}")
    expect(page.get_by_role("heading", name=api.run, level=1)).to_be_visible()
    # In one look: the page may be getting more of them.
    indices = page.evaluate(
        "[...document.querySelectorAll('main button, main input, main summary')]"
        ".filter(each => each.checkVisibility() && !each.disabled).map(each => each.tabIndex)"
    )
    assert len(indices) > 5 and min(indices) >= 0


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
