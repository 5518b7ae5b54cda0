"""Output on a terminal.

Text that users or the service have chosen is shown literally: in a name, `[/0]` is no markup of rich's, `:x:` is no
emoji, and an escape sequence does not move the cursor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["literal", "print_error", "print_json", "print_line", "print_result", "printable", "table"]


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
    Console().print(table(columns, rows))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose cells are shown literally; without a header if no column has a name."""
    made = Table(box=None, header_style="bold", show_header=any(columns))
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*map(literal, row))
    return made


def print_json(found: BaseModel | Sequence[BaseModel] | dict[str, Any]) -> None:
    """Prints a model, a list of models or a document as JSON."""
    document: object = found
    if isinstance(found, BaseModel):
        document = found.model_dump(mode="json")
    elif not isinstance(found, dict):
        document = [each.model_dump(mode="json") for each in found]
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
