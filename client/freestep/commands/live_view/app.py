"""The application: the screen of all runs, and on it that of one."""

from __future__ import annotations

from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType

from freestep.client import Client
from freestep.commands.live_view.run_screen import RunScreen
from freestep.commands.live_view.runs_screen import RunsScreen

__all__ = ["LiveView"]


class LiveView(App[None]):
    """What `freestep top` shows.

    run: the one to begin with. every_s: seconds between two looks at the service, at least.
    """

    TITLE = "freestep"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [Binding("q", "quit", "quit")]

    def __init__(self, client: Client, run: str | None = None, every_s: float = 1.0) -> None:
        super().__init__()
        self._client = client
        self._first = run
        self._every_s = every_s

    def on_mount(self) -> None:
        self.push_screen(RunsScreen(self._client, self._every_s))
        if self._first is not None:
            self.push_screen(RunScreen(self._client.run(self._first), self._every_s))
