"""The documents' blocks of code, and whether what they call exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from documents.commands import commands
from freestep_service.settings import Settings

__all__ = ["LANGUAGES", "ROOT", "Block", "blocks_of", "documents", "indented_blocks", "unknown_in"]

ROOT = Path(__file__).parent.parent.parent

LANGUAGES = {"python", "bash", "text", "pycon", "nginx", "caddy", "yaml"}
"""`text` is for what nobody runs; examples of docstrings (`pycon`) have a test beside those of docstrings."""
_BLOCK = re.compile(r"(?:^<!-- (.*?) -->\n)?^( *)```([^\n]*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
_MADE = "docs/reference/"
_ASSIGNMENT = re.compile(r"\w+=")
_OTHERS = {"apt-get", "cd", "curl", "docker", "export", "helm", "kubectl", "pip", "printf", "promtool", "torchrun"}
"""Programs that blocks that are not run may call beside freestep, Python and make."""


class Block(NamedTuple):
    """A block of code. note: the comment before it; `not run: WHY` has it looked at only."""

    document: str
    line: int
    language: str
    text: str
    note: str

    @property
    def is_run(self) -> bool:
        return not self.note.startswith("not run: ")


def documents() -> list[str]:
    """The documents with blocks, by their paths in the repository; those that are made of the code have none of use."""
    found = [*ROOT.glob("*.md"), ROOT / "docker" / "README.md", *ROOT.glob("docs/**/*.md")]
    paths = sorted(str(file.relative_to(ROOT)) for file in found)
    return [path for path in paths if not path.startswith(_MADE) and (blocks_of(path) or indented_blocks(path))]


def blocks_of(document: str) -> list[Block]:
    """The blocks of a document in their order."""
    text = (ROOT / document).read_text()
    found = []
    for match in _BLOCK.finditer(text):
        note, indent, language, code = match.groups()
        code = re.sub(rf"(?m)^{indent}", "", code)
        found.append(Block(document, text.count("\n", 0, match.start()) + 1, language, code, note or ""))
    return found


def indented_blocks(document: str) -> list[str]:
    """Blocks of code by indentation, which say of no language what they are."""
    text = _BLOCK.sub("", (ROOT / document).read_text())
    return re.findall(r"(?:\A|\n\n)((?: {4}\S.*\n)+)", re.sub(r"(?m)^(?:[-*]|\d+\.) .*\n(?:\n? {2,}.*\n)*", "", text))


def unknown_in(text: str) -> Iterator[str]:
    """What a block of bash calls that does not exist: commands and options of freestep, modules, files, targets."""
    known = {each.name: each for each in commands()}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        if not words:
            continue
        program, *rest = words
        program = Path(program).name
        if program == "freestep":
            yield from _unknown_of_freestep(rest, known)
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            yield from (each for each in rest if "=" not in each and each not in targets)
        elif program == "python":
            name = rest[1] if rest[0] == "-m" else rest[0]
            is_there = find_spec(name) is not None if rest[0] == "-m" else (ROOT / name).exists()
            # A reader's own script.
            if not is_there and name != "train.py":
                yield f"python {name}"
        elif program not in _OTHERS:
            yield program


def _unknown_of_freestep(words: list[str], known: dict[str, object]) -> Iterator[str]:
    name = next((" ".join(["freestep", *words[:n]]) for n in (2, 1) if " ".join(["freestep", *words[:n]]) in known), "")
    if not name:
        yield f"freestep {' '.join(words)}"
        return
    if name == "freestep serve":
        spellings = {"--" + each.replace("_", "-") for each in Settings.model_fields}
    else:
        parameters = next(each for each in commands() if each.name == name).parameters
        spellings = {spelling for each in parameters for spelling in each.spellings}
    yield from (f"{name} {word}" for word in words if word.startswith("-") and word.split("=")[0] not in spellings)
