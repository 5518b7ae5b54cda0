"""Text on a terminal is shown literally, whoever has chosen it."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from freestep.terminal import literal, print_error, print_json, print_line, print_result, printable

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
