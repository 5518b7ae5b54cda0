"""`make screenshots`: pictures of the dashboard for the documents, of a run that trains here and loses a worker.

PYTHONPATH=tests python -m dashboard FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import trustme
from PIL import Image
from playwright.sync_api import Browser, Page

from dashboard.browser import CHROMIUM, chromium
from dashboard.points import accuracy
from forked import Script
from freestep import Client
from harness import TOKEN, ThreadService
from meanwhile import DEADLINE_S, under_way, wait_until

TRAINER = Path(__file__).with_name("trainer.py")
_WIDE, _PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
_STEPS = 1500
"""Steps after which the pictures are taken."""
_SHOWN_MS = 2500
"""For curves and tables to be filled."""


def main(folder: Path) -> None:
    if CHROMIUM is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(place)
        service = ThreadService(place / "data", checkpoint_seconds=8.0)
        stack.callback(service.stop)
        workers = [stack.enter_context(trainer(service, "points", f"gpu-{number}")) for number in range(4)]
        stack.enter_context(trainer(service, "points-fast", "gpu-9", lr=0.02, durability="journal"))
        evaluating = threading.Event()
        stack.callback(evaluating.set)
        evaluation = under_way(lambda: evaluate(service.url, evaluating))
        browser = stack.enter_context(chromium())
        # Opened before anything happens, so that the page has seen it.
        opened = [open_page(browser, service.url, viewport, scheme) for viewport, scheme in SHOTS.values()]
        wait_for_step(service.url, _STEPS // 3)
        workers[-1].kill()
        wait_for_step(service.url, 2 * _STEPS // 3)
        stack.enter_context(trainer(service, "points", "gpu-4"))
        wait_for_step(service.url, _STEPS)
        for name, page in zip(SHOTS, opened, strict=True):
            page.wait_for_timeout(_SHOWN_MS)
            save(page.screenshot(full_page=True), folder / f"run-{name}.png")
            page.get_by_role("link", name="freestep").click()
            page.wait_for_timeout(3 * _SHOWN_MS)
            save(page.screenshot(), folder / f"runs-{name}.png")
        evaluating.set()
        evaluation.result()


SHOTS = {"1280": (_WIDE, "light"), "1280-dark": (_WIDE, "dark"), "390": (_PHONE, "light")}
"""The pictures, by what their names end with."""


def save(picture: bytes, file: Path) -> None:
    """Writes a picture with 256 colours, which is all that it has but for the edges of letters."""
    Image.open(BytesIO(picture)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4).save(
        file, optimize=True
    )


def prepare(place: Path) -> None:
    """The environment of services and clients, as tests have it."""
    (place / "admin-token").write_text(TOKEN)
    (place / "admin-token").chmod(0o600)
    trustme.CA().cert_pem.write_to_path(place / "ca.pem")
    os.environ |= {
        "FREESTEP_ADMIN_TOKEN_FILE": str(place / "admin-token"),
        "FREESTEP_TOKEN": TOKEN,
        "SSL_CERT_FILE": str(place / "ca.pem"),
        "XDG_CONFIG_HOME": str(place),
    }


def trainer(service: ThreadService, run: str, worker: str, lr: float = 0.004, **options: object) -> Script:
    given = {"algorithm": "adamw_schedule_free", "lr": lr, "lease_ttl_ms": 4000, **options}
    made = Script(TRAINER, run, worker, json.dumps(given), "0.06", FREESTEP_URL=service.url)
    assert made.read_line() == "trains"
    return made


def evaluate(url: str, is_over: threading.Event) -> None:
    """Reports how good x is, about once a second."""
    with Client(url) as client:
        run = client.run("points")
        while not is_over.wait(1.0):
            x, step = run.pull("x")
            run.report("accuracy", accuracy(x), step)


def open_page(browser: Browser, url: str, viewport: dict[str, int], scheme: str) -> Page:
    page = browser.new_context(viewport=viewport, color_scheme=scheme, device_scale_factor=1).new_page()  # type: ignore[arg-type]
    with Client(url) as client:
        page.goto(client.dashboard_link("points"))
    page.get_by_role("heading", name="points", exact=True).wait_for()
    return page


def wait_for_step(url: str, step: int) -> None:
    with Client(url) as client:
        run = client.run("points")
        wait_until(lambda: run.status().step >= step, pause_s=0.2, deadline_s=DEADLINE_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
