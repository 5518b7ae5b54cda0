"""Tensors on the wire: a run's parameters or gradients as one safetensors body.

A body is an 8-byte little-endian header length, a JSON header, and the tensors' bytes without a gap:

    {"__metadata__": {str: str}, NAME: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

The law of this file: it reads no socket and computes with no tensor. A `Receiver` says where the next bytes
belong and is told how many arrived, so that a socket can fill the flat vector itself; whatever it is fed, it
ends with the manifest's tensors in their slots or with MalformedTensors, in time and memory that the manifest
bounds and the sender does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NoReturn, Protocol

from freestep.errors import MalformedTensors
from freestep.models import ParameterSpec

__all__ = [
    "ENCODINGS",
    "INDICES",
    "ITEMSIZE",
    "MEDIA_TYPE",
    "SCALE",
    "VALUES",
    "Beside",
    "Encoding",
    "Manifest",
    "Receiver",
    "Sink",
    "Slot",
    "encode_header",
    "header_of",
    "lay",
]

MEDIA_TYPE = "application/vnd.safetensors"

ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes per element of the dtypes that travel."""

ENCODINGS = ("dense", "int8", "topk")
"""Of gradients."""
SCALE, VALUES, INDICES = "::scale", "::values", "::indices"
"""What follows a tensor's name where an encoding names something else of it."""

_SIZES = {**ITEMSIZE, "I8": 1, "I32": 4, "I64": 8}
_PREFIX = 8
_ALIGNMENT = 8


_TOLERANCE = 0.02
"""How far, in shares of a shard, a cut may move to where a row ends: two cuts keep a shard within 5% of its share."""


@dataclass(frozen=True)
class Slot:
    """A tensor's place in the flat vector: elements `offset` to `offset + numel`.

    In a shard's manifest it may be a part of a tensor: `start` is then where the part begins in the flattened
    tensor, and its shape is [rows, ...] where it is whole rows, else [numel].
    """

    name: str
    shape: tuple[int, ...]
    group: str
    offset: int
    numel: int
    start: int = 0


class Manifest:
    """The run's tensors in order, and where each lies in the flat vector of `numel` elements.

    A shard's manifest (`part`) is elements `begin` to `end` of the whole model's flat vector.
    """

    def __init__(self, parameters: Iterable[ParameterSpec]) -> None:
        slots: list[Slot] = []
        offset = 0
        for parameter in parameters:
            numel = prod(parameter.shape)
            slots.append(Slot(parameter.name, parameter.shape, parameter.group, offset, numel))
            offset += numel
        self._assemble(slots, 0, offset)

    def _assemble(self, slots: Iterable[Slot], begin: int, end: int) -> None:
        self.slots = tuple(slots)
        self.by_name = {slot.name: slot for slot in self.slots}
        self.begin, self.end = begin, end
        self.numel = end - begin
        self._tails: dict[str, bytes] = {}
        self._layouts: dict[tuple[str, int], _Layout] = {}

    def part(self, index: int, count: int) -> Manifest:
        """Shard `index` of `count`: a stretch of the flat vector of about `numel / count` elements.

        Where it can, a cut falls between two tensors or two rows of one; a tensor whose rows are too long for
        shards of equal size is cut within a row. One of 1 is the whole.
        """
        begin, end = self._cut(index, count), self._cut(index + 1, count)
        if (begin, end) == (0, self.numel):
            return self
        made = Manifest(())
        made._assemble(self._slices(begin, end), begin, end)
        return made

    def _cut(self, index: int, count: int) -> int:
        """Where shard `index` begins; rows end at multiples of a tensor's trailing dimensions."""
        ideal = self.numel * index // count
        if ideal in (0, self.numel):
            return ideal
        slot = next(slot for slot in self.slots if slot.offset <= ideal < slot.offset + slot.numel)
        row = prod(slot.shape[1:])
        below = ideal - (ideal - slot.offset) % row
        nearest = min((below, min(below + row, self.numel)), key=lambda place: abs(place - ideal))
        return nearest if abs(nearest - ideal) <= _TOLERANCE * self.numel / count else ideal

    def _slices(self, begin: int, end: int) -> Iterator[Slot]:
        for slot in self.slots:
            first, last = max(slot.offset, begin), min(slot.offset + slot.numel, end)
            # An empty tensor belongs to the shard whose stretch it lies in, and to the last one at the very end.
            is_here = begin <= slot.offset < end or slot.offset == end == self.numel
            if first >= last and not (slot.numel == 0 and is_here):
                continue
            numel, start = last - first, first - slot.offset
            shape, row = slot.shape, prod(slot.shape[1:])
            if numel != slot.numel:
                is_rows = start % row == 0 and numel % row == 0
                shape = (numel // row, *slot.shape[1:]) if is_rows else (numel,)
            yield Slot(slot.name, shape, slot.group, first - begin, numel, start)

    @cached_property
    def header_limit(self) -> int:
        """The longest header accepted, in bytes: four times the plainest one, and room for metadata."""
        return 4 * len(encode_header(self, "F32")) + 65_536

    @property
    def body_limit(self) -> int:
        """The longest body accepted, in bytes."""
        return _PREFIX + self.header_limit + ITEMSIZE["F32"] * self.numel

    @property
    def encoded_limit(self) -> int:
        """The longest body accepted of any encoding, in bytes: all elements as values with their indices."""
        return _PREFIX + self.header_limit + (_SIZES["F32"] + _SIZES["I64"]) * self.numel

    def tail(self, dtype: str) -> bytes:
        """What follows the metadata in a plain header, which is one of all tensors in order and of one dtype."""
        if dtype not in self._tails:
            header = {
                entry.slot.name: {
                    "dtype": dtype,
                    "shape": list(entry.slot.shape),
                    "data_offsets": [entry.begin, entry.end],
                }
                for entry in self._plain(dtype)
            }
            self._tails[dtype] = json.dumps(header, separators=(",", ":")).encode()[1:]
        return self._tails[dtype]

    def layout(self, dtype: str, itemsize: int) -> _Layout:
        """Where the tensors of a plain header go, in a target of `itemsize` bytes an element."""
        if (dtype, itemsize) not in self._layouts:
            self._layouts[dtype, itemsize] = _lay_out(self._plain(dtype), itemsize)
        return self._layouts[dtype, itemsize]

    def _plain(self, dtype: str) -> Iterator[_Entry]:
        size = ITEMSIZE[dtype]
        for slot in self.slots:
            yield _Entry(slot.name, slot, "", dtype, slot.numel, size * slot.offset, size * (slot.offset + slot.numel))


def encode_header(manifest: Manifest, dtype: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """The prefix and header of a body that holds the manifest's tensors in order, all of one dtype.

    The header is padded with spaces so that the tensors begin at a multiple of 8 bytes.
    """
    text = b"{"
    if metadata:
        text += b'"__metadata__":' + json.dumps(dict(metadata), separators=(",", ":")).encode()
        text += b"," if manifest.slots else b""
    text += manifest.tail(dtype)
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_PREFIX, "little") + text


def header_of(items: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """As `encode_header`, of items by name, dtype and shape."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in items:
        end = begin + prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_PREFIX, "little") + text


@dataclass(frozen=True)
class Encoding:
    """How a body holds its tensors, as its metadata says.

    dense: a tensor `w` as it is. int8: `w` as I8, and `w::scale`, F32, one for each `block` elements of the flattened
    tensor (the last block may have fewer); an element is q · scale. topk: `w::values` and `w::indices`, I32 or I64, of
    k elements of the flattened tensor; the others are 0.
    """

    name: str = "dense"
    block: int = 256

    @classmethod
    def of(cls, metadata: Mapping[str, str], accepted: Collection[str]) -> Encoding:
        """What a body's metadata says. Raises MalformedTensors."""
        name = metadata.get("freestep.encoding", "dense")
        if name not in accepted:
            _refuse(f"the encoding is not one of {', '.join(accepted)}", encoding=name)
        if name != "int8":
            return cls(name)
        block = metadata.get("freestep.block", str(cls.block))
        if not re.fullmatch(r"[1-9][0-9]{0,9}", block):
            _refuse("freestep.block is not a number of elements", block=block)
        return cls(name, int(block))

    def metadata(self) -> dict[str, str]:
        """What the body says of itself."""
        if self.name == "dense":
            return {}
        block = {"freestep.block": str(self.block)} if self.name == "int8" else {}
        return {"freestep.encoding": self.name, **block}

    def roles(self, manifest: Manifest) -> dict[str, tuple[Slot, str]]:
        """The names in the header: whose each is, and what. Raises MalformedTensors where one stands for two things."""
        roles = {"dense": ("",), "int8": ("", SCALE), "topk": (VALUES, INDICES)}[self.name]
        names = {slot.name + role: (slot, role) for slot in manifest.slots for role in roles}
        if len(names) != len(roles) * len(manifest.slots):
            _refuse("the run has tensors whose names are those of other tensors' encodings", encoding=self.name)
        return names

    def dtypes(self, role: str) -> tuple[str, ...]:
        """What something may be of."""
        if role == "":
            return ("I8",) if self.name == "int8" else tuple(ITEMSIZE)
        return {SCALE: ("F32",), VALUES: tuple(ITEMSIZE), INDICES: ("I32", "I64")}[role]

    def shape(self, slot: Slot, role: str) -> tuple[int, ...] | None:
        """The shape that something has; None where the sender chooses k."""
        if role == SCALE:
            return (-(-slot.numel // self.block),)
        return slot.shape if role == "" else None


@dataclass(frozen=True)
class Beside:
    """What an encoding has beside a tensor, or instead of it."""

    dtype: str
    memory: memoryview


@dataclass(frozen=True)
class _Entry:
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


@dataclass(frozen=True)
class _Layout:
    """Each tensor's dtype, and the stretches of a target, in bytes, that a body's tensors fill one after the other."""

    dtypes: Mapping[str, str]
    landings: Sequence[tuple[int, int]]


class Sink(Protocol):
    """Where bytes that are received belong; as in `asyncio.BufferedProtocol`."""

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; empty when there is no room for more."""

    def buffer_updated(self, size: int) -> None:
        """Takes note that `size` bytes were put at the front of `get_buffer()`. May raise; then it is used no more."""


def lay(sink: Sink, data: bytes | bytearray | memoryview) -> None:
    """Copies bytes that lie elsewhere into a sink.

    Raises what the sink raises, and MalformedTensors when it has no room for them.
    """
    view = memoryview(data)
    while view:
        buffer = sink.get_buffer()
        if not buffer:
            _refuse("there are bytes left over after the last tensor")
        size = min(len(buffer), len(view))
        buffer[:size] = view[:size]
        view = view[size:]
        sink.buffer_updated(size)


class Receiver:
    """Lays a body of `length` bytes into `target`, a writable byte view of a flat vector.

    `target` holds `itemsize` bytes for each element of the manifest. A tensor whose dtype is narrower than that
    lands right-aligned in its slot, so that it can be widened in place from the front; `dtypes` names, once the
    header is read, each tensor's dtype as it came. What an encoding has beside that, or instead of it, lands in memory
    of its own: `beside`, by its name in the header.

    It is a Sink, until it is `complete`. With `encodings` it takes bodies of these.
    """

    def __init__(
        self,
        manifest: Manifest,
        target: memoryview,
        length: int,
        itemsize: int = 4,
        encodings: Collection[str] = ("dense",),
    ) -> None:
        if length < _PREFIX:
            _refuse("the body is shorter than the 8 bytes of its header length")
        limit = manifest.body_limit if tuple(encodings) == ("dense",) else manifest.encoded_limit
        if length > limit:
            _refuse("the body is longer than the run's tensors can be", limit=limit)
        self.dtypes: Mapping[str, str] = {}
        self.metadata: Mapping[str, str] = {}
        self.encoding = Encoding()
        self.beside: dict[str, Beside] = {}
        self._manifest = manifest
        self._target = target
        self._length = length
        self._itemsize = itemsize
        self._encodings = encodings
        self._header: bytearray | None = None
        self._pending: list[memoryview] = [memoryview(bytearray(_PREFIX))]
        self._prefix = self._pending[0]
        self._received = 0

    @property
    def complete(self) -> bool:
        """Whether the whole body has arrived."""
        return not self._pending

    @property
    def missing(self) -> int:
        """How many bytes of the body have not arrived."""
        return self._length - self._received

    def get_buffer(self) -> memoryview:
        """Where the next bytes of the body belong; empty once it is complete."""
        return self._pending[-1] if self._pending else memoryview(b"")

    def buffer_updated(self, size: int) -> None:
        """Takes note that `size` bytes were put at the front of `get_buffer()`.

        Raises MalformedTensors as soon as what arrived cannot be the manifest's tensors.
        """
        self._received += size
        rest = self._pending[-1][size:]
        if rest:
            self._pending[-1] = rest
            return
        self._pending.pop()
        if self._pending:
            return
        if self._header is None:
            self._begin_header()
        elif self._prefix:
            self._begin_tensors()

    def _begin_header(self) -> None:
        size = int.from_bytes(self._prefix, "little")
        if size > self._length - _PREFIX:
            _refuse("the header's length runs past the end of the body")
        if size > self._manifest.header_limit:
            _refuse("the header is longer than the run's can be", limit=self._manifest.header_limit)
        if size < 2:
            _refuse("the header is too short to be a JSON object")
        self._header = bytearray(size)
        self._pending = [memoryview(self._header)]

    def _begin_tensors(self) -> None:
        assert self._header is not None
        self._prefix = memoryview(b"")
        raw, data_length = bytes(self._header), self._length - _PREFIX - len(self._header)
        if (plain := _parse_plain(raw, self._manifest, data_length)) is not None:
            dtype, self.metadata = plain
            self._land(self._manifest.layout(dtype, self._itemsize))
            return
        header, self.metadata = _parse_header(raw)
        self.encoding = Encoding.of(self.metadata, self._encodings)
        entries = _parse_entries(header, self._manifest, self.encoding, data_length)
        if self.encoding.name == "dense":
            self._land(_lay_out(entries, self._itemsize))
        else:
            self._land_beside(entries)

    def _land(self, layout: _Layout) -> None:
        self.dtypes = layout.dtypes
        self._pending = [self._target[begin:end] for begin, end in reversed(layout.landings)]

    def _land_beside(self, entries: Sequence[_Entry]) -> None:
        self.dtypes = {entry.slot.name: entry.dtype for entry in entries if not entry.role}
        self._pending = []
        for entry in reversed(entries):
            if entry.role:
                place = memoryview(bytearray(entry.size))
                self.beside[entry.name] = Beside(entry.dtype, place)
            else:
                end = (entry.slot.offset + entry.slot.numel) * self._itemsize
                place = self._target[end - entry.size : end]
            if place:
                self._pending.append(place)


def _lay_out(entries: Iterable[_Entry], itemsize: int) -> _Layout:
    dtypes: dict[str, str] = {}
    landings: list[tuple[int, int]] = []
    for entry in entries:
        size = entry.size
        end = (entry.slot.offset + entry.slot.numel) * itemsize
        if ITEMSIZE[entry.dtype] > itemsize:
            _refuse(f"the tensor {entry.slot.name!r} is {entry.dtype}, wider than what was asked for")
        dtypes[entry.slot.name] = entry.dtype
        if landings and landings[-1][1] == end - size:
            landings[-1] = (landings[-1][0], end)
        elif size:
            landings.append((end - size, end))
    return _Layout(dtypes, landings)


def _parse_plain(raw: bytes, manifest: Manifest, data_length: int) -> tuple[str, dict[str, str]] | None:
    """The dtype and metadata of a header as `encode_header` makes it, found without parsing what is known.

    None for any other header; this accepts nothing that `_parse_header` would not.
    """
    text = raw.rstrip(b" ")
    for dtype, itemsize in ITEMSIZE.items():
        tail = manifest.tail(dtype)
        if not text.endswith(tail) or data_length != itemsize * manifest.numel:
            continue
        head = text[: -len(tail)]
        if head == b"{":
            return dtype, {}
        if head.startswith(b'{"__metadata__":') and head.endswith(b"},"):
            try:
                header, metadata = _parse_header(head[:-1] + b"}")
            except MalformedTensors:
                return None
            return (dtype, metadata) if not header and "freestep.encoding" not in metadata else None
    return None


def _parse_header(raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's entries by their names, and its metadata."""
    if raw[:1] != b"{":
        _refuse("the header does not begin with {")
    try:
        # Decoded here, since json.loads would accept UTF-16, UTF-32 and encoded surrogates too.
        header = json.loads(raw.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(f"the header is not JSON: {type(error).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        _refuse("the header's __metadata__ is not a map of strings")
    try:
        "".join([*metadata, *metadata.values()]).encode()
    except UnicodeEncodeError:
        _refuse("the header's __metadata__ holds half of a surrogate pair")
    return header, metadata


def _parse_entries(header: Mapping[str, Any], manifest: Manifest, encoding: Encoding, data_length: int) -> list[_Entry]:
    """The entries in the order of their bytes."""
    roles = encoding.roles(manifest)
    for name in header:
        if name not in roles:
            _refuse(f"the run has no tensor {name!r}")
    for name in roles:
        if name not in header:
            _refuse(f"the tensor {name!r} is missing")
    entries = sorted(
        (_parse_entry(name, *roles[name], encoding, value) for name, value in header.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    end = 0
    for entry in entries:
        if entry.begin != end:
            _refuse(f"the tensor {entry.name!r} leaves a gap or overlaps another")
        end = entry.end
    if end != data_length:
        _refuse("the tensors do not fill the body", expected=end, received=data_length)
    if encoding.name == "topk":
        counts = {entry.name: entry.count for entry in entries}
        for slot in manifest.slots:
            if counts[slot.name + VALUES] != counts[slot.name + INDICES]:
                _refuse(f"the values and the indices of {slot.name!r} are not of one number")
    return entries


def _parse_entry(name: str, slot: Slot, role: str, encoding: Encoding, value: object) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(f"the entry of {name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtypes = encoding.dtypes(role)
    if not isinstance(dtype, str) or dtype not in dtypes:
        _refuse(f"the dtype of {name!r} is not one of {', '.join(dtypes)}")
    if not _is_sizes(shape):
        _refuse(f"the shape of {name!r} is not a list of sizes")
    wanted = encoding.shape(slot, role)
    if wanted is None:
        if len(shape) != 1 or shape[0] > slot.numel:
            _refuse(f"the shape of {name!r} is not [k], with k at most {slot.numel}")
    elif tuple(shape) != wanted:
        _refuse(f"the shape of {name!r} is not {list(wanted)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        _refuse(f"the data_offsets of {name!r} are not two sizes")
    begin, end = offsets
    count = prod(shape)
    if end - begin != count * _SIZES[dtype]:
        _refuse(f"the data_offsets of {name!r} do not span its {count} elements of {dtype}")
    return _Entry(name, slot, role, dtype, count, begin, end)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name stands twice")
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse(detail: str, **extensions: Any) -> NoReturn:
    raise MalformedTensors(detail, **extensions)
