"""Markdown that pages are made of, and docstrings as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["anchor", "cell", "code", "docstring", "indented", "made_by", "table"]

_SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Example|Examples|Attributes):$")
_ITEM = re.compile(r"^ {4}(\*{0,2}[\w.]+): (.*)$")


def made_by(command: str, what: str) -> str:
    """The first line of a page that a command writes."""
    return f"<!-- {what}. Do not edit: `{command}` writes this page. -->\n"


def anchor(heading: str) -> str:
    """The fragment of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def code(text: object) -> str:
    """Text as code, also where it has backticks."""
    text = str(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def cell(text: str) -> str:
    """Text as it may stand in a table: one line, and no bar of its own."""
    return " ".join(text.split()).replace("\\|", "|").replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; no text where it has no rows."""
    made = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    if not made:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *made]) + "\n"


def docstring(text: str) -> str:
    """A docstring as Markdown: sections such as "Args:" as lists, examples as blocks of code."""
    parts = [_block(part) for part in re.split(r"\n(?=(?:Args|Raises|Returns|Yields|Examples?):\n)", text)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _block(text: str) -> str:
    head, _, body = text.partition("\n")
    name = _SECTION.match(head)
    if name is None:
        return text
    if name[1].startswith("Example"):
        return f"```pycon\n{indented(body, -4).strip()}\n```"
    return f"**{name[1]}**\n\n{_items(body)}"


def _items(body: str) -> str:
    """The items of a section, each with the lines that belong to it."""
    items: list[str] = []
    for line in body.splitlines():
        item = _ITEM.match(line)
        if item is not None:
            items.append(f"- {code(item[1])}: {item[2]}")
        elif items and line.strip():
            items[-1] += f" {line.strip()}"
        elif line.strip():
            items.append(f"- {line.strip()}")
    return "\n".join(items)


def indented(text: str, by: int) -> str:
    """Lines moved right, or left by as much as they have."""
    if by >= 0:
        return "\n".join(" " * by + line if line else line for line in text.splitlines())
    return "\n".join(re.sub(rf"^ {{0,{-by}}}", "", line) for line in text.splitlines())
