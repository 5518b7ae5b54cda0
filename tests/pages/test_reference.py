"""The pages of docs/reference are what the code makes of them, and say what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import freestep
from documents import chart, llms, python_api
from documents.commands import commands
from documents.markdown import cell, code, docstring
from documents.reference import FOLDER, made
from freestep.errors import PROBLEMS
from freestep_service.settings import Settings

CLIENT = Path(__file__).parent.parent.parent / "client" / "freestep"
WORKER = FOLDER.parent / "guides" / "worker.md"


def test_pages_are_current() -> None:
    pages = made()
    kept = {str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*") if file.is_file()}
    stale = {name for name, text in pages.items() if name not in kept or (FOLDER / name).read_text() != text}
    assert not stale | (kept - pages.keys()), "run `make reference`, and commit what it writes"


def test_the_page_of_python_is_the_same_once_an_optimizer_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(python_api.pages())
    wrapped = torch.optim.Optimizer.profile_hook_step(freestep.AdamCScheduleFreePlus.step)  # type: ignore[arg-type]
    monkeypatch.setattr(freestep.AdamCScheduleFreePlus, "step", wrapped)
    assert list(python_api.pages()) == before


def test_programs_find_every_page() -> None:
    assert llms.FILE.read_text() == llms.made(), "run `make reference`, and commit what it writes"
    links = re.findall(r"\]\((.*?)\)", llms.made())
    assert len(links) > 40 and all((llms.FILE.parent / link).exists() for link in links)


def test_the_charts_readme_is_current_and_describes_each_group() -> None:
    assert chart.FILE.read_text() == chart.made(), "run `make reference`, and commit what it writes"
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) \| (.*) \|$", chart.made(), re.MULTILINE)
    described = {name for name, _, text in rows if text}
    assert len(rows) > 100 and len(described) >= 70
    assert ("shards.replicas", "`1`") in {(name, default) for name, default, _ in rows}
    assert ("networkPolicy.clients", '`[{"podSelector": {}}]`') in {(name, default) for name, default, _ in rows}


def test_the_charts_schema_knows_each_setting() -> None:
    assert chart.SCHEMA.read_text() == chart.schema(), "run `make reference`, and commit what it writes"
    settings = json.loads(chart.SCHEMA.read_text())["properties"]["shards"]["properties"]["settings"]
    assert {name.replace("-", "_") for name in settings["properties"]} == Settings.model_fields.keys()
    assert settings["additionalProperties"] is False


def test_the_readme_is_short() -> None:
    assert len((FOLDER.parent.parent / "README.md").read_text().splitlines()) <= 150


def test_each_problem_has_a_page_of_its_name() -> None:
    for slug in PROBLEMS:
        assert f"`urn:freestep:problem:{slug}`" in (FOLDER / "problems" / f"{slug}.md").read_text()


def test_each_setting_and_command_is_there() -> None:
    settings, page = (FOLDER / "settings.md").read_text(), (FOLDER / "commands.md").read_text()
    assert all(f"`--{name.replace('_', '-')}`" in settings for name in Settings.model_fields)
    assert all(f"## {command.name}\n" in page for command in commands())


def test_the_variables_of_clients_are_described() -> None:
    of_the_demo = {"FREESTEP_SHARDS"}
    used = {name for file in CLIENT.rglob("*.py") for name in re.findall(r"\bFREESTEP_[A-Z_]+\b", file.read_text())}
    of_the_service = {f"FREESTEP_{name.upper()}" for name in Settings.model_fields}
    assert not {name for name in used - of_the_demo - of_the_service if f"`{name}`" not in WORKER.read_text()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What it does.", "What it does.\n"),
        ("Does.\n\nArgs:\n    one: First,\n        and more.\n    **two: Second.", "Does.\n\n**Args**\n\n"
         "- `one`: First, and more.\n- `**two`: Second.\n"),
        ("Does.\n\nExample:\n    >>> run()\n    ...", "Does.\n\n```pycon\n>>> run()\n...\n```\n"),
    ],
)  # fmt: skip
def test_docstrings_become_markdown(text: str, expected: str) -> None:
    assert docstring(text) == expected


def test_text_keeps_its_place_in_a_table() -> None:
    assert cell("a | b\nc \\| d") == "a \\| b c \\| d"
    assert (code("x"), code("a`b")) == ("`x`", "`` a`b ``")
