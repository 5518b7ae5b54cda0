"""Text on a terminal is shown literally, whoever has chosen it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console

from freestep.terminal import literal, print_error, print_json, print_line, print_result, printable, table

NAMES = {
    "gpu[/0]": "gpu[/0]",
    "[red]acc[/top1]": "[red]acc[/top1]",
    "ppl[wikitext] :boom:": "ppl[wikitext] :boom:",
    "\\[x]": "\\[x]",
    "a\x1b[31mb": r"a\x1b[31mb",
    "two\r\nlines": r"two\r\nlines",
    "\u202eleft \x07\x9b": r"\u202eleft \x07\x9b",
    "ü 日 🚀": "ü 日 🚀",
    "\udc80": r"\udc80",
}
"""Each name as it is to be shown."""


class Named(BaseModel):
    name: str


@pytest.mark.parametrize(("name", "shown"), NAMES.items(), ids=map(ascii, NAMES))
def test_a_name_is_shown_literally(name: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (printable(name), literal(name).plain) == (shown, shown)
    print_line(f"{name} is here")
    print_result([], False, ("name", "step"), [(name, 3)])
    print_error(f"no {name}")
    out, error = capsys.readouterr()
    line, _, row = out.splitlines()
    assert (line, row.strip().removesuffix("3").strip()) == (f"{shown} is here", shown)
    assert error == f"no {shown}\n"


def test_json_has_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_result([Named(name="[/x]\x1b")], True, ("name",), [])
    print_json(Named(name="w"))
    print_json({"name": None})
    parts = ['[\n  {\n    "name": "[/x]\\u001b"\n  }\n]\n', '{\n  "name": "w"\n}\n', '{\n  "name": null\n}\n']
    assert capsys.readouterr().out == "".join(parts)


COLUMNS = ("id", "worker of it", "steps_per_second", "last used")
ROWS = [
    ("4f0c6c1e9b7d4a55", "site-a-gpu-17", 1.416e-07, "2026-11-29 18:03"),
    ("日" * 8, "b", "-", "some words that are more than a short cell may have"),
]


def drawn(columns: Sequence[str], rows: Sequence[Sequence[object]], width: int) -> list[str]:
    """The lines of a table on a terminal of this width."""
    console = Console(file=io.StringIO(), width=1000)
    console.print(table(columns, rows, width))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 60, 68, 80, 100, 200])
def test_no_word_of_a_table_is_broken(width: int) -> None:
    lines = drawn(COLUMNS, ROWS, width)
    assert max(map(cell_len, lines)) <= max(width, 18 + len(str(ROWS[1][3])))
    words = " ".join(lines).split()
    for cell in (*COLUMNS, *(cell for row in ROWS for cell in row)):
        assert set(str(cell).split()) <= set(words)
    # Short cells are on one line.
    assert any("2026-11-29 18:03" in line for line in lines)


def test_a_table_is_folded_and_then_made_of_blocks_where_it_is_too_wide() -> None:
    assert len(drawn(COLUMNS, ROWS, 200)) == 3
    assert drawn(COLUMNS, ROWS, 80)[0].split() == ["id", "worker", "of", "it", "steps_per_second", "last", "used"]
    assert drawn(COLUMNS, ROWS, 40)[:5] == [
        "id                4f0c6c1e9b7d4a55",
        "worker of it      site-a-gpu-17",
        "steps_per_second  1.416e-07",
        "last used         2026-11-29 18:03",
        "",
    ]


def test_what_is_known_of_one_thing_is_folded_beside_its_name() -> None:
    assert drawn(("", ""), [("run", "mnist"), ("settings", "lr=0.001 betas=(0.9, 0.999) r=0.0 eps=1e-08")], 36) == [
        "run      mnist",
        "settings lr=0.001 betas=(0.9, 0.999)",
        "         r=0.0 eps=1e-08",
    ]


def test_a_pipe_gets_a_row_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_result([], False, ("id", "quota"), [("a" * 100, "b " * 100 + "c")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("quota")
