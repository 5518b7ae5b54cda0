"""Parts of the dashboard's pages, as a user sees them."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import Locator, Page, expect

from forked import Script
from meanwhile import DEADLINE_S, wait_until

__all__ = ["PHONE", "OpenPage", "Train", "cell_of", "chart", "last_step", "painted", "reaches", "row_of", "step_of"]

OpenPage = Callable[..., Page]
Train = Callable[..., Script]
PHONE = {"width": 390, "height": 844}

expect.set_options(timeout=1000 * DEADLINE_S)


def _tile(page: Page, name: str) -> str:
    """The text of a tile of a run's page."""
    return page.locator(f".tile:has(dt:text-is('{name}')) dd").inner_text()


def step_of(page: Page) -> int:
    """The step that a run's page shows; 0 until it shows one."""
    text = _tile(page, "Step").replace(",", "")
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
