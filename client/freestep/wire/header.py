"""Headers of safetensors bodies: encoding and parsing.

A body is an 8-byte little-endian header length, a JSON header, and the tensors' bytes without a gap:

    {"__metadata__": {str: str}, NAME: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn, TypeAlias

from freestep.errors import MalformedTensors
from freestep.wire.encoding import INDICES, INT8, ITEMSIZE, SIZES, VALUES, Encoding
from freestep.wire.manifest import Manifest, Slot

__all__ = [
    "PREFIX",
    "Entry",
    "body_limit",
    "data_length",
    "encode_header",
    "encoded_limit",
    "header_limit",
    "header_of",
    "parse_entries",
    "parse_header",
    "parse_plain",
    "plain_entries",
]

Item: TypeAlias = tuple[str, str, Sequence[int]]
"""A name in a header, with its dtype and shape."""

PREFIX = 8
"""Bytes of the header's length, at the beginning of a body."""
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A header's entry of a tensor, or of a part of its encoding: `count` elements, bytes `begin` to `end`."""

    name: str
    slot: Slot
    role: str
    dtype: str
    count: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def header_limit(manifest: Manifest) -> int:
    """The longest header accepted, in bytes: four times the shortest one, and room for metadata."""
    return manifest.derived(_header_limit)


def _header_limit(manifest: Manifest) -> int:
    return 4 * len(encode_header(manifest, "F32")) + 65_536


def body_limit(manifest: Manifest) -> int:
    """The longest body accepted, in bytes."""
    return PREFIX + header_limit(manifest) + ITEMSIZE["F32"] * manifest.numel


def encoded_limit(manifest: Manifest) -> int:
    """The longest body accepted in any encoding, in bytes: all elements as values with their indices."""
    return PREFIX + header_limit(manifest) + (SIZES["F32"] + SIZES["I64"]) * manifest.numel


def plain_entries(manifest: Manifest, dtype: str) -> Iterator[Entry]:
    """The entries of a plain header: all tensors in order, in one dtype."""
    size = ITEMSIZE[dtype]
    for slot in manifest.slots:
        yield Entry(slot.name, slot, "", dtype, slot.numel, size * slot.offset, size * (slot.offset + slot.numel))


def _tail(manifest: Manifest, dtype: str) -> bytes:
    """The bytes after the metadata in a plain header."""
    return json.dumps(_described(_items(manifest, dtype)), separators=(",", ":")).encode()[1:]


def _items(manifest: Manifest, dtype: str) -> Iterator[Item]:
    if dtype == "I8":
        return INT8.int8_items(manifest)
    return ((slot.name, dtype, slot.shape) for slot in manifest.slots)


def data_length(manifest: Manifest, dtype: str) -> int:
    """The bytes of a body after a header from `encode_header`."""
    return manifest.derived(_data_length, dtype)


def _data_length(manifest: Manifest, dtype: str) -> int:
    return sum(prod(shape) * SIZES[kind] for _, kind, shape in _items(manifest, dtype))


def encode_header(manifest: Manifest, dtype: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """The length prefix and header of a body with the manifest's tensors in order, in one dtype.

    For I8 the encoding is INT8. The header is padded with spaces, so that the tensors begin at a multiple of 8 bytes.
    """
    text = b"{"
    if dtype == "I8":
        metadata = {**(metadata or {}), **INT8.metadata()}
    if metadata:
        text += b'"__metadata__":' + json.dumps(dict(metadata), separators=(",", ":")).encode()
        text += b"," if manifest.slots else b""
    text += manifest.derived(_tail, dtype)
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(PREFIX, "little") + text


def header_of(items: Iterable[Item], metadata: Mapping[str, str] | None = None) -> bytes:
    """As `encode_header`, for items given by name, dtype and shape."""
    header = {**({"__metadata__": dict(metadata)} if metadata else {}), **_described(items)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(PREFIX, "little") + text


def _described(items: Iterable[Item]) -> dict[str, Any]:
    """The entries of items whose bytes follow each other."""
    entries: dict[str, Any] = {}
    begin = 0
    for name, dtype, shape in items:
        end = begin + prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    return entries


def parse_plain(raw: bytes, manifest: Manifest, data_length: int) -> tuple[str, dict[str, str]] | None:
    """The dtype and metadata of a header from `encode_header`, without parsing its entries; None for any other header.

    It accepts nothing that `parse_header` and `parse_entries` would refuse.
    """
    text = raw.rstrip(b" ")
    for dtype, itemsize in ITEMSIZE.items():
        tail = manifest.derived(_tail, dtype)
        if not text.endswith(tail) or data_length != itemsize * manifest.numel:
            continue
        head = text[: -len(tail)]
        if head == b"{":
            return dtype, {}
        if head.startswith(b'{"__metadata__":') and head.endswith(b"},"):
            try:
                header, metadata = parse_header(head[:-1] + b"}")
            except MalformedTensors:
                return None
            return (dtype, metadata) if not header and "freestep.encoding" not in metadata else None
    return None


def parse_header(raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's entries by their names, and its metadata."""
    if raw[:1] != b"{":
        raise MalformedTensors("the header does not begin with {")
    try:
        # Decoded here: json.loads would also accept UTF-16, UTF-32 and encoded surrogates.
        header = json.loads(raw.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedTensors(f"the header is not JSON: {type(error).__name__}") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise MalformedTensors("the header's __metadata__ is not a map of strings")
    try:
        "".join([*metadata, *metadata.values()]).encode()
    except UnicodeEncodeError:
        raise MalformedTensors("the header's __metadata__ contains half of a surrogate pair") from None
    return header, metadata


def parse_entries(header: Mapping[str, Any], manifest: Manifest, encoding: Encoding, data_length: int) -> list[Entry]:
    """The entries in the order of their bytes."""
    roles = encoding.roles(manifest)
    for name in header:
        if name not in roles:
            raise MalformedTensors(f"the run has no tensor {name!r}")
    for name in roles:
        if name not in header:
            raise MalformedTensors(f"the tensor {name!r} is missing")
    entries = sorted(
        (_parse_entry(name, *roles[name], encoding, value) for name, value in header.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise MalformedTensors(f"the tensor {entry.name!r} leaves a gap or overlaps another")
        end = entry.end
    if end != data_length:
        raise MalformedTensors("the tensors do not fill the body", expected=end, received=data_length)
    if encoding.name == "topk":
        counts = {entry.name: entry.count for entry in entries}
        for slot in manifest.slots:
            if counts[slot.name + VALUES] != counts[slot.name + INDICES]:
                raise MalformedTensors(f"{slot.name!r} has another number of values than of indices")
    return entries


def _parse_entry(name: str, slot: Slot, role: str, encoding: Encoding, value: object) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedTensors(f"the entry of {name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtypes = encoding.dtypes(role)
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise MalformedTensors(f"the dtype of {name!r} is not one of {', '.join(dtypes)}")
    if not _is_sizes(shape):
        raise MalformedTensors(f"the shape of {name!r} is not a list of sizes")
    wanted = encoding.shape(slot, role)
    if wanted is None:
        if len(shape) != 1 or shape[0] > slot.numel:
            raise MalformedTensors(f"the shape of {name!r} is not [k], with k at most {slot.numel}")
    elif tuple(shape) != wanted:
        raise MalformedTensors(f"the shape of {name!r} is not {list(wanted)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise MalformedTensors(f"the data_offsets of {name!r} are not two sizes")
    begin, end = offsets
    count = prod(shape)
    if end - begin != count * SIZES[dtype]:
        raise MalformedTensors(f"the data_offsets of {name!r} do not span its {count} elements of {dtype}")
    return Entry(name, slot, role, dtype, count, begin, end)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name is used twice")
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
