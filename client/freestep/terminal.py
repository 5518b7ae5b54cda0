"""Output on a terminal.

Text that users or the service have chosen is shown literally: in a name, `[/0]` is no markup of rich's, `:x:` is no
emoji, and an escape sequence does not move the cursor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from io import TextIOWrapper
from typing import Any

from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "literal",
    "print_error",
    "print_json",
    "print_line",
    "print_result",
    "printable",
    "show_all_characters",
    "table",
]

_SHORT = 24
"""The width of a cell up to which it is not folded."""
_UNBOUNDED = 1_000_000


def show_all_characters() -> None:
    """Has the standard output show what its encoding lacks as escape sequences, as Python's standard error does."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(value: object) -> str:
    """A value as text of one line, its control characters written as escape sequences."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(value))


def literal(value: object) -> Text:
    """A value as text of one line that rich does not interpret."""
    return Text(printable(value))


def print_line(value: object) -> None:
    """Prints a value on one line."""
    Console().print(literal(value), soft_wrap=True)


def print_error(message: str) -> None:
    """Prints a message on one line of stderr."""
    sys.stderr.write(f"{printable(message)}\n")


def print_result(
    found: BaseModel | Sequence[BaseModel], as_json: bool, columns: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Prints what the service answered, as JSON or as a table of these rows."""
    if as_json:
        print_json(found)
        return
    console = Console()
    # Who reads a pipe gets lines as long as they are.
    made = table(columns, rows, console.width if console.is_terminal else _UNBOUNDED)
    # Else rich breaks a word that is longer than a line, and who copies it has not the whole.
    console.width = _UNBOUNDED
    with console.capture() as captured:
        console.print(made)
    # Rich fills the last column with spaces, too.
    console.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], width: int) -> Table:
    """A table whose cells are shown literally; without a header if no column has a name.

    Its columns are folded between words where it would be wider than `width` characters; short cells stay on a line.
    If it is still too wide, each row is a block of lines, one for each column.
    """
    cells = [[literal(cell) for cell in row] for row in rows]
    texts = list(zip(map(literal, columns), *cells, strict=True))
    widths = [max(each.cell_len for each in column) for column in texts]
    least = [max(map(_least_width, column[1:]), default=0) for column in texts]
    least = [max(own, *map(cell_len, column[0].plain.split(" "))) for own, column in zip(least, texts, strict=True)]
    gap = 2 if sum(widths) + 2 * (len(columns) - 1) <= width else 1
    room = width - gap * (len(columns) - 1)
    if sum(least) > room and any(columns):
        return _blocks(columns, cells)
    while sum(widths) > room and widths != least:
        widest = max((own for own in range(len(widths)) if widths[own] > least[own]), key=widths.__getitem__)
        widths[widest] -= 1
    made = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold", show_header=any(columns))
    for column, own in zip(columns, widths, strict=True):
        made.add_column(literal(column), width=own, overflow="fold")
    for row in cells:
        made.add_row(*row)
    return made


def _least_width(cell: Text) -> int:
    """The width in which no word of a cell is broken, and a short one is on one line."""
    return cell.cell_len if cell.cell_len <= _SHORT else max(map(cell_len, cell.plain.split(" ")))


def _blocks(columns: Sequence[str], cells: Sequence[Sequence[Text]]) -> Table:
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for number, row in enumerate(cells):
        if number:
            made.add_row()
        for column, cell in zip(columns, row, strict=True):
            made.add_row(literal(column), cell)
    return made


def print_json(found: BaseModel | Sequence[BaseModel] | dict[str, Any]) -> None:
    """Prints a model, a list of models or a document as JSON."""
    document: object = found
    if isinstance(found, BaseModel):
        document = found.model_dump(mode="json")
    elif not isinstance(found, dict):
        document = [each.model_dump(mode="json") for each in found]
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
