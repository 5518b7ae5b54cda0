"""Pages whose tables a benchmark writes, between markers `<!-- made: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["fill"]

_MARKED = re.compile(r"<!-- made: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def fill(page: Path, made: Mapping[str, str]) -> None:
    """Puts Markdown between the markers of its name. Raises KeyError for a marker that nothing was made for."""
    text = _MARKED.sub(lambda match: f"<!-- made: {match[1]} -->\n{made[match[1]]}\n<!-- end -->", page.read_text())
    page.write_text(text)
