"""A browser for a module's tests, and pages whose scripts may not fail."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from dashboard.browser import CHROMIUM, chromium
from forked import Script
from freestep import Client
from harness import ThreadService

TRAINER = Path(__file__).with_name("trainer.py")
_WIDE = {"width": 1280, "height": 900}
_AWAY = "Failed to load resource"
"""What a browser says of a service that is away, or refuses."""


# Of a module: while it is there, the thread has an event loop, which other modules' tests have not reckoned with.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with chromium() as made:
        yield made


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages of a service, each in a browser of its own, signed in by a link; their scripts may not fail.

    They may ask nobody but the service, and no page may break its content-security policy.
    """
    with ExitStack() as stack:
        wrong: list[str] = []

        def open_(url: str, path: str = "#/", *, signs_in: bool = True, **options: Any) -> Page:
            context = browser.new_context(**{"viewport": _WIDE, **options})
            stack.callback(context.close)
            page = context.new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
            page.on("request", lambda request: request.url.startswith(url) or wrong.append(request.url))

            def note(message: Any) -> None:
                if message.type in ("error", "warning") and _AWAY not in message.text:
                    wrong.append(message.text)

            page.on("console", note)
            if signs_in:
                with Client(url) as client:
                    page.goto(client.dashboard_link())
                page.get_by_role("heading", name="Runs").wait_for()
            page.goto(f"{url}/{path}")
            return page

        yield open_
        assert not wrong


@pytest.fixture
def run() -> str:
    """The name of a run of the test's own."""
    return f"run-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def train() -> Iterator[Callable[..., Script]]:
    """Starts workers, which are killed with the test; returns when a worker has made its first step."""
    with ExitStack() as stack:

        def start(service: ThreadService, run: str, worker: str = "worker", **options: Any) -> Script:
            pause = options.pop("pause", 0.02)
            given = {"algorithm": "adamw_schedule_free", "lr": 0.004, "lease_ttl_ms": 2000, **options}
            made = stack.enter_context(
                Script(TRAINER, run, worker, json.dumps(given), str(pause), FREESTEP_URL=service.url)
            )
            assert made.read_line() == "trains"
            return made

        yield start
