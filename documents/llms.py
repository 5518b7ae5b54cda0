"""llms.txt: the documents for programs that read them, by name and first sentence, in the order of the navigation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from documents.navigation import ELSEWHERE, NAVIGATION, Entries
from documents.reference import ROOT

__all__ = ["FILE", "made"]

FILE = ROOT / "docs" / "llms.txt"
_SUMMARY = (
    "Schedule-Free optimization as a service: a parameter server over plain HTTP, workers that push gradients and may"
    " come and go, evaluators that pull the average x at any moment. Pages are Markdown."
)
_NO_PROSE = re.compile(r"^(?:<!--|```|\||#|!\[|- )")


def made() -> str:
    """The file as it should be."""
    return "\n".join(["# freestep\n", f"> {_SUMMARY}", *_sections(NAVIGATION)]) + "\n"


def _sections(entries: Entries) -> Iterator[str]:
    for title, below in entries:
        if isinstance(below, str):
            yield from _page(title, below)
        elif any(isinstance(each, str) for _, each in below):
            yield f"\n## {title}\n"
            yield from _sections(below)
        else:
            yield from _sections(below)


def _page(title: str, page: str) -> Iterator[str]:
    kept = {name: path for path, name in ELSEWHERE.items()}
    file = ROOT / kept[page] if page in kept else ROOT / "docs" / page
    if file.exists():
        link = os.path.relpath(file, FILE.parent)
        sentence = _first_sentence(file.read_text())
        yield f"- [{title}]({link})" + (f": {sentence}" if sentence else "")


def _first_sentence(text: str) -> str:
    """The first sentence of a page, without links; no text where it begins with something else than prose."""
    below = re.search(r"^# [^\n]*\n\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    if below is None or _NO_PROSE.match(below[1]):
        return ""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(below[1].split()).replace("**", ""))
    return re.split(r"(?<=[.:]) ", plain)[0].rstrip(".:")
