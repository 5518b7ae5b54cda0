"""The documents name what exists: links, paths in backticks, and in ARCHITECTURE.md every file of both packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"The service, file by file": "service/freestep_service", "The client, file by file": "client/freestep"}
"""Where the paths of a table of ARCHITECTURE.md begin, by its heading."""
DOCUMENTS = sorted(
    {*(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "SECURITY.md")), *ROOT.glob("docs/**/*.md")}
)

_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
_NAMES_A_FILE = re.compile(r".*\.(py|lua|md|toml|txt|yml)")
_PLACEHOLDER = re.compile(r"(^|/)[A-Z]+(/|$)")


def prose(text: str) -> str:
    """A document without its blocks of code."""
    return _FENCED.sub("", text)


def paths(text: str) -> set[str]:
    """The paths in backticks: names of files, and what begins with a directory of the repository or of a package."""
    found = {code for code in _CODE.findall(prose(text)) if _PATH.fullmatch(code) and not _PLACEHOLDER.search(code)}
    return {path for path in found if _NAMES_A_FILE.fullmatch(path) or ("/" in path and places(path.split("/")[0]))}


def places(path: str) -> list[Path]:
    """Where a path leads, from the repository's root and from both packages."""
    bases = (ROOT, *(ROOT / package for package in PACKAGES.values()))
    return [base / path for base in bases if (base / path).exists()]


def anchors(document: Path) -> set[str]:
    """The fragments of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in _LINK.findall(prose(document.read_text())):
        if "://" in link:
            continue
        name, _, fragment = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_backticks_exist(document: Path) -> None:
    assert not {path for path in paths(document.read_text()) if not places(path)}


@pytest.mark.parametrize(("heading", "package"), PACKAGES.items(), ids=PACKAGES.values())
def test_the_map_names_every_file_once(heading: str, package: str) -> None:
    _, _, section = (ROOT / "ARCHITECTURE.md").read_text().partition(f"\n## {heading}\n")
    section = section.partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    named = sorted(path for row in rows for path in _CODE.findall(row))
    files = (file for suffix in ("py", "lua") for file in (ROOT / package).rglob(f"*.{suffix}"))
    assert named == sorted(str(file.relative_to(ROOT / package)) for file in files if file.name != "__init__.py")


def test_every_decision_is_in_the_index() -> None:
    index = ROOT / "docs" / "decisions" / "README.md"
    listed = sorted(_LINK.findall(index.read_text()))
    assert [link for link in listed if "/" not in link] == sorted(
        file.name for file in index.parent.glob("*.md") if file != index
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`runs/pushes.py` and `web/`", {"runs/pushes.py", "web/"}),
        ("`optimizers/sums` was moved", {"optimizers/sums"}),
        ("`gone.py`", {"gone.py"}),
        ("`runs/RUN/run.json`, `/v1/runs/{run}`, `x.safetensors`, `freestep serve`, `q/scale`", set()),
        ("```\n`gone.py`\n```\n", set()),
    ],
    ids=["files and directories", "without a suffix", "alone", "no paths of the repository", "a block of code"],
)
def test_paths_are_told_from_other_code(text: str, found: set[str]) -> None:
    assert paths(text) == found
