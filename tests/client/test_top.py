"""`freestep top`, as a person uses it, beside a service that goes on."""

from __future__ import annotations

import asyncio
import math
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, RichLog, Sparkline, Static

import forked
from freestep import Client, Run, RunNotFound
from freestep.commands.live_view.app import LiveView
from freestep.commands.live_view.run_screen import RunScreen
from freestep.commands.live_view.runs_screen import RunsScreen
from freestep.commands.live_view.worker_screen import WorkerScreen
from freestep.commands.top import top
from harness import ProcessService, ThreadService
from plain_calls import SGD, TENSORS

WORKER = "gpu[/0]\x1b[1m"
"""A name that a terminal or rich could take for orders."""
Work = Callable[[LiveView, Pilot[None]], Awaitable[None]]


@pytest.fixture
def client(service: ThreadService) -> Iterator[Client]:
    with Client(service.url, retry_for=0, timeout=10) as made:
        yield made


@pytest.fixture
def run(client: Client) -> Run:
    """A run with its weights."""
    made = client.run(f"top-{uuid.uuid4().hex[:8]}")
    parameters = [{"name": name, "shape": list(tensor.shape)} for name, tensor in TENSORS.items()]
    made.create({"optimizer": SGD, "aggregation": {"policy": "async"}, "parameters": parameters})
    made.initialize(TENSORS)
    return made


def use(client: Client, work: Work, first: str | None = None) -> None:
    """Opens the view on a terminal of a test, and has a person use it."""

    async def begin() -> None:
        app = LiveView(client, first, every_s=0.05)
        async with app.run_test(size=(140, 40)) as pilot:
            await work(app, pilot)

    asyncio.run(asyncio.wait_for(begin(), 120))


async def until(pilot: Pilot[None], condition: Callable[[], Any]) -> None:
    """Waits for what the view is to show."""
    while not condition():
        await pilot.pause(0.02)


def table(app: LiveView, name: str) -> dict[str, list[str]]:
    """The cells of a table's rows by the first of them; none while its screen is being made."""
    rows = [
        [str(cell) for cell in found.get_row_at(number)]
        for found in app.screen.query(f"#{name}").results(DataTable)
        for number in range(found.row_count)
    ]
    return {row[0]: row for row in rows}


def text(app: LiveView, name: str) -> str:
    """What a line shows, likewise."""
    return "".join(str(found.content) for found in app.screen.query(f"#{name}").results(Static))


def lines(app: LiveView, name: str) -> list[str]:
    """What a log shows, likewise."""
    return [strip.text for found in app.screen.query(f"#{name}").results(RichLog) for strip in found.lines]


async def choose(app: LiveView, pilot: Pilot[None], name: str, row: str) -> None:
    """Goes to a row of a table by the arrows, and presses Enter."""
    await until(pilot, lambda: row in table(app, name))
    found = app.screen.query_one(f"#{name}", DataTable)
    found.focus()
    await until(pilot, lambda: found.has_focus)
    for _ in range(list(table(app, name)).index(row) - found.cursor_row):
        await pilot.press("down")
    await pilot.press("enter")


def pushes(run: Run, lease: Any, first: int, count: int) -> None:
    for step in range(first, first + count):
        run.push(TENSORS, lease.claim(step, loss=float(step)))


def test_all_runs_one_of_them_and_a_worker(client: Client, run: Run) -> None:
    async def work(app: LiveView, pilot: Pilot[None]) -> None:
        lease = await asyncio.to_thread(run.lease, WORKER)
        await until(pilot, lambda: table(app, "runs").get(run.name, [""] * 9)[8] == "1")
        await choose(app, pilot, "runs", run.name)
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        await asyncio.to_thread(pushes, run, lease, 0, 3)
        await until(pilot, lambda: "epoch 1, step 3" in text(app, "facts"))
        shown = "gpu[/0]\\x1b[1m"
        await until(pilot, lambda: table(app, "workers").get(shown, ["", ""])[1] == "3")
        await until(pilot, lambda: list(app.screen.query_one("#loss", Sparkline).data or []) == [0.0, 1.0, 2.0])
        assert "2 now, 0 to 2, to step 3" in text(app, "loss-ends")
        await until(pilot, lambda: sum("push" in line for line in lines(app, "events")) == 3)
        await choose(app, pilot, "workers", shown)
        await until(pilot, lambda: isinstance(app.screen, WorkerScreen))
        await until(pilot, lambda: "3 pushes under it" in text(app, "worker-facts"))
        await until(pilot, lambda: len(lines(app, "worker-events")) == 4)
        await asyncio.to_thread(lease.release)
        await until(pilot, lambda: "holds no lease" in text(app, "worker-facts"))
        await until(pilot, lambda: "released" in lines(app, "worker-events")[-1])
        await pilot.press("escape", "escape", "escape")
        await until(pilot, lambda: isinstance(app.screen, RunsScreen))
        assert table(app, "runs")[run.name][4] == "3"

    use(client, work)


def test_a_loss_above_0_is_drawn_by_its_logarithm(client: Client, run: Run) -> None:
    async def work(app: LiveView, pilot: Pilot[None]) -> None:
        lease = await asyncio.to_thread(run.lease, "w")
        for step, loss in enumerate((1.0, math.e)):
            await asyncio.to_thread(run.push, TENSORS, lease.claim(step, loss=loss))
        await until(pilot, lambda: len(app.screen.query_one("#loss", Sparkline).data or []) == 2)
        assert list(app.screen.query_one("#loss", Sparkline).data or []) == pytest.approx([0.0, 1.0])
        assert "loss (log): 2.718 now, 1 to 2.718, to step 2" in text(app, "loss-ends")

    use(client, work, run.name)


def test_the_footer_says_how_a_row_is_chosen(client: Client, run: Run) -> None:
    async def work(app: LiveView, pilot: Pilot[None]) -> None:
        await choose(app, pilot, "runs", run.name)
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, RunsScreen))
        shown = {key: each.binding.description for key, each in app.screen.active_bindings.items() if each.binding.show}
        assert (shown["enter"], shown["up"], shown["q"]) == ("look into", "choose", "quit")

    use(client, work)


def test_a_run_that_does_not_exist_is_refused(service: ThreadService, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    with pytest.raises(RunNotFound, match="nowhere"):
        top("nowhere", url=service.url)


def test_the_chosen_row_stays_chosen(client: Client, run: Run) -> None:
    async def work(app: LiveView, pilot: Pilot[None]) -> None:
        for name in ("b", "c"):
            await asyncio.to_thread(run.lease, name)
        await until(pilot, lambda: len(table(app, "workers")) == 2)
        workers = app.screen.query_one("#workers", DataTable)
        workers.focus()
        await pilot.press("down")
        await until(pilot, lambda: workers.cursor_row == 1)
        await asyncio.to_thread(run.lease, "a")
        await until(pilot, lambda: list(table(app, "workers")) == ["a", "b", "c"])
        assert workers.cursor_row == 2

    use(client, work, run.name)


def test_a_run_that_is_deleted_is_named(client: Client, run: Run) -> None:
    async def work(app: LiveView, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: text(app, "facts"))
        await asyncio.to_thread(run.delete)
        await until(pilot, lambda: f"no run '{run.name}'" in text(app, "problem"))
        assert app.screen.query_one("#problem").display
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, RunsScreen))
        await until(pilot, lambda: app.screen.sub_title and run.name not in table(app, "runs"))

    use(client, work, run.name)


@pytest.mark.slow
def test_a_service_that_is_away_is_named_until_it_is_back(start_process: Callable[..., ProcessService]) -> None:
    service = start_process()
    with Client(service.url, retry_for=0, timeout=5) as client:

        async def work(app: LiveView, pilot: Pilot[None]) -> None:
            await until(pilot, lambda: app.screen.sub_title == "0 runs")
            assert not app.screen.query_one("#problem").display
            await asyncio.to_thread(service.stop)
            await until(pilot, lambda: service.url.removeprefix("http://") in text(app, "problem"))
            await asyncio.to_thread(service.start)
            await until(pilot, lambda: not app.screen.query_one("#problem").display)

        use(client, work)


def test_it_quits_at_once(client: Client, run: Run) -> None:
    async def work(app: LiveView, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: text(app, "facts"))
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)

    use(client, work, run.name)


def test_it_needs_a_terminal(service: ThreadService) -> None:
    shown = forked.freestep("top", FREESTEP_URL=service.url)
    assert (shown.returncode, "needs a terminal" in shown.stderr) == (2, True)


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [each for each in sys.modules if each.startswith("freestep.commands.live_view")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "textual.app", None)
    with pytest.raises(SystemExit) as ended:
        top()
    assert ended.value.code == 2
    assert "pip install 'freestep[top]'" in capsys.readouterr().err
