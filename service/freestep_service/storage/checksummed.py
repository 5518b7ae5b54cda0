"""Documents in storage that tell for themselves whether they are as they were written.

The law of this file: a document is JSON that names its format and its own checksum, and what fails either is Damaged,
never something else. Checksums are XXH3-128, against damage and not against forgery.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

__all__ = ["Damaged", "verified", "with_checksum"]

_FORMAT = 2


class Damaged(Exception):
    """What is in storage fails its checks; the message says how."""


def with_checksum(document: Mapping[str, Any]) -> bytes:
    """A document as JSON that names its format and its own checksum."""
    content = {"format": _FORMAT, **document}
    return json.dumps(content | {"checksum": _checksum(content)}, indent=1).encode()


def verified(text: bytes) -> dict[str, Any]:
    """The document that was sealed. Raises Damaged."""
    try:
        content = json.loads(text)
        checksum = content.pop("checksum")
        expected = _checksum(content)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise Damaged(f"its manifest cannot be read ({type(error).__name__})") from error
    if checksum != expected:
        raise Damaged("its manifest does not have the checksum that it names")
    if content.pop("format", None) != _FORMAT:
        raise Damaged("its format is not the one that this version reads")
    return dict(content)


def _checksum(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())
