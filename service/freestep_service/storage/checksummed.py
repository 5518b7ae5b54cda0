"""JSON documents in storage that name their format and their own checksum.

Checksums are XXH3-128: they find damage, not forgery. A document that fails a check raises Damaged and nothing else;
one of a newer format raises NewerFormat.

The law of formats: `format` and `checksum` are in all documents, for ever, so that each version tells a newer one from
a damaged one. A member that a reader may do without is no new format. Another format is another layout too
(domain/layout.py), since processes share storage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from freestep.errors import StorageUnavailable
from freestep_service.storage.medium import Storage

__all__ = ["Damaged", "NewerFormat", "parse_document", "read_document", "write_document"]

_FORMAT = 2


class Damaged(ValueError):
    """A file was read and is not what was written; the message says what is wrong with it."""


class NewerFormat(StorageUnavailable):
    """A file is whole, and a newer version of freestep has written it: it is neither read nor replaced.

    what: of it this version does not know, as in "is of format 3, and this version of freestep knows format 2".
    """

    def __init__(self, path: object, what: str) -> None:
        super().__init__(f"{path} {what}: start the version that wrote it")

    @classmethod
    def of(cls, path: object, found: int, known: int) -> NewerFormat:
        """That of a file of a format beyond the newest that is known."""
        return cls(path, f"is of format {found}, and this version of freestep knows format {known}")


def write_document(storage: Storage, path: str, document: Mapping[str, Any]) -> None:
    """Writes a document with its format and its checksum. Raises StorageUnavailable."""
    content = {"format": _FORMAT, **document}
    storage.write(path, [json.dumps(content | {"checksum": _checksum(content)}, indent=1).encode()])


def read_document(storage: Storage, path: str) -> dict[str, Any]:
    """The document as it was written. Raises FileNotFoundError, Damaged, StorageUnavailable, NewerFormat of it."""
    try:
        return parse_document(storage.read(path), f"{storage}/{path}")
    except IsADirectoryError as error:
        raise Damaged("it is a directory") from error


def parse_document(text: bytes, path: str) -> dict[str, Any]:
    """As `read_document`, of what was read there. Raises Damaged, NewerFormat."""
    try:
        content = json.loads(text)
        checksum = content.pop("checksum")
        expected = _checksum(content)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise Damaged(f"it is no document with a checksum ({type(error).__name__})") from error
    if checksum != expected:
        raise Damaged("it does not have the checksum that it names")
    found = content.pop("format", None)
    if type(found) is int and found > _FORMAT:
        raise NewerFormat.of(path, found, _FORMAT)
    if found != _FORMAT:
        raise Damaged(f"its format is not {_FORMAT}, the one that this version reads")
    return dict(content)


def _checksum(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())
