"""The site: pages are gathered in one folder, their links led there, and Zensical makes HTML of them.

Zensical does not see all faults, so what it has made is looked at: links, fragments, and what would be loaded from
elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from documents.navigation import ELSEWHERE, NAVIGATION, Entries, paths
from documents.reference import ROOT

__all__ = ["SITE", "build"]

DOCS = ROOT / "docs"
BUILD = ROOT / "build" / "docs"
PAGES, SITE = BUILD / "pages", BUILD / "site"

_FENCED = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".json": "json", ".yml": "yaml", ".lua": "lua"}
_QUOTED_ELSEWHERE = "lab/*.md"
"""Tables that the page of the lab quotes."""


def build() -> list[str]:
    """Builds the site anew; returns what is wrong with it."""
    shutil.rmtree(BUILD, ignore_errors=True)
    faults = _gather()
    PAGES.mkdir(parents=True, exist_ok=True)
    config = BUILD / "zensical.toml"
    config.write_text(_config())
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BUILD, env={**os.environ, "NO_COLOR": "1"})
    if done.returncode:
        faults.append((done.stdout + done.stderr).strip())
    _add_markdown()
    return faults + list(_faults_of_html())


def _add_markdown() -> None:
    """Puts the pages beside the site's, as llms.txt names them."""
    for file in PAGES.rglob("*.md"):
        target = SITE / file.relative_to(PAGES)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _gather() -> list[str]:
    """Copies all pages and pictures to one folder; returns links that lead nowhere."""
    faults: list[str] = []
    places = {ROOT / path: page for path, page in ELSEWHERE.items()}
    left_out = set(DOCS.glob(_QUOTED_ELSEWHERE))
    for file in sorted(DOCS.rglob("*")):
        if file.is_file() and file not in left_out:
            places[file] = str(file.relative_to(DOCS))
    missing = set(paths(NAVIGATION)) - set(places.values())
    faults += [f"the navigation names {page}, which does not exist" for page in sorted(missing)]
    for file, page in list(places.items()):
        if file.suffix in (".md", ".txt"):
            _put(page, _led(file, page, places, faults).encode())
        else:
            _put(page, file.read_bytes())
    for file, page in places.items():
        if page.startswith("source/"):
            _put(page, _source(file).encode())
    return faults


def _put(page: str, content: bytes) -> None:
    target = PAGES / page
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def _led(file: Path, page: str, places: dict[Path, str], faults: list[str]) -> str:
    """A page whose links lead to pages of the site; files that are none become some."""
    text = file.read_text()

    def lead(match: re.Match[str]) -> str:
        link, _, fragment = match[1].partition("#")
        if not link or "://" in link or link.startswith("mailto:"):
            return match[0]
        target = (file.parent / link).resolve()
        if target.is_dir():
            target /= "README.md"
        if target not in places:
            if not target.is_file() or ROOT not in target.parents:
                faults.append(f"{file.relative_to(ROOT)}: {match[1]} leads nowhere on the site")
                return match[0]
            places[target] = f"source/{target.relative_to(ROOT)}.md"
        led = os.path.relpath(places[target], Path(page).parent)
        return f"{led}#{fragment}" if fragment else led

    # Blocks of code stay as they are.
    parts, end = [], 0
    for block in _FENCED.finditer(text):
        parts += [_LINK.sub(lead, text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, _LINK.sub(lead, text[end:])])


def _source(file: Path) -> str:
    """A page that shows a file of the repository."""
    language = _LANGUAGES.get(file.suffix, "text")
    return f"# {file.relative_to(ROOT)}\n\n````{language}\n{file.read_text()}````\n"


def _config() -> str:
    settings = {
        "site_name": "freestep",
        "site_description": "Schedule-Free optimization as a service",
        "docs_dir": "pages",
        "site_dir": "site",
    }
    lines = ["[project]", *(f"{name} = {json.dumps(value)}" for name, value in settings.items())]
    lines.append(f"nav = {_nav(NAVIGATION)}")
    # Nothing is loaded from elsewhere, fonts neither.
    lines += ["[project.extra]", "generator = false", "[project.theme]", "font = false"]
    features = ("navigation.sections", "navigation.tabs", "navigation.top", "content.code.copy", "search.highlight")
    lines.append(f"features = {json.dumps(features)}")
    for media, scheme, icon, other in (("light", "default", "sun", "dark"), ("dark", "slate", "moon", "light")):
        lines += [
            "[[project.theme.palette]]",
            f'media = "(prefers-color-scheme: {media})"',
            f'scheme = "{scheme}"',
            f'toggle.icon = "lucide/{icon}"',
            f'toggle.name = "Switch to {other} mode"',
        ]
    lines += [
        "[project.markdown_extensions]",
        "attr_list = {}",
        "sane_lists = {}",
        "tables = {}",
        "toc.permalink = true",
        "pymdownx.highlight.pygments_lang_class = true",
        "pymdownx.superfences = {}",
    ]
    return "\n".join(lines) + "\n"


def _nav(entries: Entries) -> str:
    made = []
    for title, below in entries:
        if not isinstance(below, str):
            made.append(f"{{ {json.dumps(title)} = {_nav(below)} }}")
        elif (PAGES / below).exists():
            made.append(f"{{ {json.dumps(title)} = {json.dumps(below)} }}")
    return f"[{', '.join(made)}]"


class _Page(HTMLParser):
    """The links and the ids of a page of HTML, and what it loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if "src" in found:
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect") and "href" in found:
            self.loaded.append(found["href"])


def _faults_of_html() -> Iterator[str]:
    """Links of the site that lead nowhere, and what it would load from elsewhere."""
    made = {file: _Page(file) for file in SITE.rglob("*.html") if file.name != "404.html"}
    if not made:
        yield "no page was made"
    for file, page in made.items():
        name = file.relative_to(SITE)
        yield from (f"{name} loads {each} from elsewhere" for each in page.loaded if "//" in each)
        for link in [*page.links, *page.loaded]:
            if "://" in link or link.startswith("mailto:"):
                continue
            path, _, fragment = unquote(link).partition("#")
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{name}: {link} leads nowhere"
            elif fragment and target in made and fragment not in made[target].ids:
                yield f"{name}: {link} names no heading"
