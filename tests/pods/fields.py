"""Reads manifests so that nothing in them is passed over: a field that nobody has asked for is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Unsupported", "known"]


class Unsupported(Exception):
    """A manifest has what this cluster does not do."""


def known(document: Mapping[str, Any], where: str, *names: str) -> None:
    """Raises Unsupported if a document has members other than these."""
    others = sorted(set(document) - set(names))
    if others:
        raise Unsupported(f"{where}: {', '.join(others)} would be passed over")
