"""A real Chromium, as Debian packages it; tests are skipped where it is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, sync_playwright

__all__ = ["CHROMIUM", "chromium"]

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
"""Where it is: `apt-get install chromium`."""
_ARGUMENTS = [
    # There is no user that it could be kept from, and no display.
    "--no-sandbox", "--disable-gpu",
    # It asks nobody but the service.
    "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip


@contextmanager
def chromium(**options: Any) -> Iterator[Browser]:
    """A browser with a profile of its own, which is gone with it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS, **options)
        try:
            yield browser
        finally:
            browser.close()
