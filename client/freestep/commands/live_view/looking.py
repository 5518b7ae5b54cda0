"""A screen that looks at the service again and again, and tables of what it has found."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, TypeVar, cast

from rich.text import Text
from textual import work
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import DataTable, Static

from freestep.errors import FreestepError
from freestep.terminal import literal

__all__ = ["LookingScreen", "fill", "new_table"]

T = TypeVar("T")


class LookingScreen(Screen[None], Generic[T]):
    """A screen that shows what it finds. Looks take a tenth of the time at the most, however slow the service is.

    What a look fails with is shown in the line `#problem`, and what was found before stays.

    every_s: seconds between two looks, at least. look: asks the service, in a thread, and may raise FreestepError.
    show: shows what was found.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "back", "back")]
    DEFAULT_CSS = """
    LookingScreen .facts { height: auto; padding: 0 1; }
    LookingScreen #problem { height: auto; padding: 0 1; color: $error; display: none; }
    LookingScreen DataTable { height: 1fr; }
    """

    def __init__(self, every_s: float, look: Callable[[], T], show: Callable[[T], None]) -> None:
        super().__init__()
        self._every_s = every_s
        self._look = look
        self._show = show

    def on_mount(self) -> None:
        self._keep_looking()

    def action_back(self) -> None:
        """Goes back to the screen below; the last one stays."""
        if len(self.app.screen_stack) > 2:
            self.app.pop_screen()

    @work
    async def _keep_looking(self) -> None:
        while True:
            began = time.monotonic()
            problem, found = "", None
            try:
                found = await asyncio.to_thread(self._look)
            except FreestepError as error:
                problem = str(error)
            if not self.app.is_running or self not in self.app.screen_stack:
                # It has been left meanwhile.
                return
            if not problem:
                self._show(cast(T, found))
            self._show_problem(problem)
            await asyncio.sleep(max(self._every_s, 9 * (time.monotonic() - began)))

    def _show_problem(self, problem: str) -> None:
        line = self.query_one("#problem", Static)
        line.update(literal(problem))
        line.display = bool(problem)


class ChoiceTable(DataTable[Text]):
    """A table in which a row can be chosen; the footer says by which keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "cursor_up", "choose", key_display="↑↓"),
        Binding("enter", "select_cursor", "look into"),
    ]


def new_table(columns: Sequence[str], name: str) -> ChoiceTable:
    """A table with these columns."""
    made = ChoiceTable(cursor_type="row", zebra_stripes=True, id=name)
    for column in columns:
        made.add_column(Text(column), key=column)
    return made


def fill(table: DataTable[Text], rows: Sequence[Sequence[object]]) -> None:
    """Gives a table these rows, whose first cells are their keys; the chosen row stays chosen."""
    chosen = None
    if table.row_count:
        chosen = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
    table.clear()
    for row in rows:
        table.add_row(*map(literal, row), key=str(row[0]))
    if chosen is not None and chosen in [str(row[0]) for row in rows]:
        table.move_cursor(row=table.get_row_index(chosen))
