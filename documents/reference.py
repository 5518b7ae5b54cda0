"""The pages of docs/reference, which are made of the code."""

from __future__ import annotations

import re
from pathlib import Path

from documents import commands, http_api, hyperparameters, python_api, settings

__all__ = ["FOLDER", "made", "write"]

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "reference"
_MAKERS = (http_api, python_api, commands, settings, hyperparameters)


def made() -> dict[str, str]:
    """All pages by their paths in the folder, as they should be."""
    return {name: _tidy(text) for maker in _MAKERS for name, text in maker.pages()}


def write() -> list[str]:
    """Writes the pages, and removes what is none of them; returns the names of those that have changed."""
    pages = made()
    changed = []
    for name, text in pages.items():
        file = FOLDER / name
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            changed.append(name)
    for file in FOLDER.rglob("*"):
        if file.is_file() and str(file.relative_to(FOLDER)) not in pages:
            file.unlink()
            changed.append(str(file.relative_to(FOLDER)))
    return changed


def _tidy(text: str) -> str:
    """No spaces at the ends of lines, one empty line between parts, one newline at the end."""
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
