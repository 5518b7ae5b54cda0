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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NoReturn, Protocol

from freestep.errors import MalformedTensors
from freestep.models import ParameterSpec

__all__ = ["ITEMSIZE", "MEDIA_TYPE", "Manifest", "Receiver", "Sink", "Slot", "encode_header", "lay"]

MEDIA_TYPE = "application/vnd.safetensors"

ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes per element of the dtypes that travel."""

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
            yield _Entry(slot, dtype, size * slot.offset, size * (slot.offset + slot.numel))


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


@dataclass(frozen=True)
class _Entry:
    slot: Slot
    dtype: str
    begin: int
    end: int


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
    header is read, each tensor's dtype as it came.

    It is a Sink, until it is `complete`.
    """

    def __init__(self, manifest: Manifest, target: memoryview, length: int, itemsize: int = 4) -> None:
        if length < _PREFIX:
            _refuse("the body is shorter than the 8 bytes of its header length")
        if length > manifest.body_limit:
            _refuse("the body is longer than the run's tensors can be", limit=manifest.body_limit)
        self.dtypes: Mapping[str, str] = {}
        self.metadata: Mapping[str, str] = {}
        self._manifest = manifest
        self._target = target
        self._length = length
        self._itemsize = itemsize
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
        elif not self.dtypes:
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
        data_length = self._length - _PREFIX - len(self._header)
        raw = bytes(self._header)
        if (plain := _parse_plain(raw, self._manifest, data_length)) is not None:
            dtype, self.metadata = plain
            layout = self._manifest.layout(dtype, self._itemsize)
        else:
            entries, self.metadata = _parse_header(raw, self._manifest, data_length)
            layout = _lay_out(entries, self._itemsize)
        self.dtypes = layout.dtypes
        self._pending = [self._target[begin:end] for begin, end in reversed(layout.landings)]


def _lay_out(entries: Iterable[_Entry], itemsize: int) -> _Layout:
    dtypes: dict[str, str] = {}
    landings: list[tuple[int, int]] = []
    for entry in entries:
        size = entry.end - entry.begin
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
                return dtype, _parse_header(head[:-1] + b"}", _NO_TENSORS, 0)[1]
            except MalformedTensors:
                return None
    return None


def _parse_header(raw: bytes, manifest: Manifest, data_length: int) -> tuple[list[_Entry], dict[str, str]]:
    """The header's entries in the order of their bytes, and its metadata."""
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
    if metadata.get("freestep.encoding", "dense") != "dense":
        _refuse("the encoding is not one that this service reads", encoding=metadata["freestep.encoding"])
    for name in header:
        if name not in manifest.by_name:
            _refuse(f"the run has no tensor {name!r}")
    for name in manifest.by_name:
        if name not in header:
            _refuse(f"the tensor {name!r} is missing")
    entries = sorted(
        (_parse_entry(manifest.by_name[name], value) for name, value in header.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    end = 0
    for entry in entries:
        if entry.begin != end:
            _refuse(f"the tensor {entry.slot.name!r} leaves a gap or overlaps another")
        end = entry.end
    if end != data_length:
        _refuse("the tensors do not fill the body", expected=end, received=data_length)
    return entries, metadata


_NO_TENSORS = Manifest(())


def _parse_entry(slot: Slot, value: object) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(f"the entry of {slot.name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        _refuse(f"the dtype of {slot.name!r} is not one of {', '.join(ITEMSIZE)}")
    if not _is_sizes(shape) or tuple(shape) != slot.shape:
        _refuse(f"the shape of {slot.name!r} is not {list(slot.shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        _refuse(f"the data_offsets of {slot.name!r} are not two sizes")
    begin, end = offsets
    if end - begin != slot.numel * ITEMSIZE[dtype]:
        _refuse(f"the data_offsets of {slot.name!r} do not span its {slot.numel} elements of {dtype}")
    return _Entry(slot, dtype, begin, end)


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
