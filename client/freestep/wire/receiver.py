"""Receives a run's parameters or gradients, a safetensors body, into a flat vector.

This file reads no socket and computes with no tensor. A `Receiver` has a buffer for the next bytes, as
`asyncio.BufferedProtocol` does, so that a socket can fill the flat vector itself. Whatever bytes it gets, it ends with
the manifest's tensors in their slots or with MalformedTensors, in time and memory that depend on the manifest only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from freestep.errors import MalformedTensors
from freestep.wire.encoding import ITEMSIZE, Encoding
from freestep.wire.header import (
    PREFIX,
    Entry,
    body_limit,
    encoded_limit,
    header_limit,
    parse_entries,
    parse_header,
    parse_plain,
    plain_entries,
)
from freestep.wire.manifest import Manifest

__all__ = ["MEDIA_TYPE", "Beside", "FramedReceiver", "Receiver", "Sink", "free_part", "lay"]

MEDIA_TYPE = "application/vnd.safetensors"


@dataclass(frozen=True)
class Beside:
    """A part of a tensor's encoding that is not in the flat vector: scales, values or indices."""

    dtype: str
    memory: memoryview


class Sink(Protocol):
    """Memory for received bytes, as in `asyncio.BufferedProtocol`."""

    def get_buffer(self) -> memoryview:
        """The memory for the next bytes; empty if there is no room for more."""

    def buffer_updated(self, size: int) -> None:
        """Called when `size` bytes are at the front of `get_buffer()`. May raise, and is not used after that."""


def free_part(sink: Sink) -> memoryview:
    """Where a sink's next bytes go. Raises what the sink raises, and MalformedTensors if it has no room for more."""
    buffer = sink.get_buffer()
    if not buffer:
        raise MalformedTensors("there are bytes left over after the last tensor")
    return buffer


def lay(sink: Sink, data: bytes | bytearray | memoryview) -> None:
    """Copies bytes into a sink.

    Raises what the sink raises, and MalformedTensors if it has no room for them.
    """
    view = memoryview(data)
    while view:
        buffer = free_part(sink)
        size = min(len(buffer), len(view))
        buffer[:size] = view[:size]
        view = view[size:]
        sink.buffer_updated(size)


class FramedReceiver(ABC):
    """Receives a body of `length` bytes: its header's length, the header, and its tensors; a Sink until `complete`.

    longest_header: bytes of the header that are accepted. Subclasses say where the tensors' bytes go.
    """

    def __init__(self, length: int, longest_header: int) -> None:
        if length < PREFIX:
            raise MalformedTensors("the body is shorter than the 8 bytes of its header length")
        self._length = length
        self._longest_header = longest_header
        self._header: bytearray | None = None
        self._pending: list[memoryview] = [memoryview(bytearray(PREFIX))]
        self._prefix = self._pending[0]
        self._received = 0

    @abstractmethod
    def _places(self, raw: bytes, data_length: int) -> Iterable[memoryview]:
        """The memory for the tensors, in the order of their bytes, from the header and their length in bytes.

        Raises MalformedTensors.
        """

    @property
    def complete(self) -> bool:
        """True once the whole body has been received."""
        return not self._pending

    @property
    def missing(self) -> int:
        """The bytes of the body that have not been received."""
        return self._length - self._received

    def get_buffer(self) -> memoryview:
        """The memory for the next bytes of the body; empty once it is complete."""
        return self._pending[-1] if self._pending else memoryview(b"")

    def buffer_updated(self, size: int) -> None:
        """Called when `size` bytes are at the front of `get_buffer()`.

        Raises MalformedTensors as soon as the bytes cannot be the tensors.
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
        if size > self._length - PREFIX:
            raise MalformedTensors("the header's length runs past the end of the body")
        if size > self._longest_header:
            raise MalformedTensors("the header is longer than it can be", limit=self._longest_header)
        if size < 2:
            raise MalformedTensors("the header is too short to be a JSON object")
        self._header = bytearray(size)
        self._pending = [memoryview(self._header)]

    def _begin_tensors(self) -> None:
        assert self._header is not None
        self._prefix = memoryview(b"")
        places = self._places(bytes(self._header), self._length - PREFIX - len(self._header))
        self._pending = [place for place in places if place][::-1]


class Receiver(FramedReceiver):
    """Receives a body of `length` bytes into `target`, the writable memory of a flat vector; a Sink until `complete`.

    `target` has `itemsize` bytes for each element of the manifest. A tensor of a narrower dtype is put at the end of
    its slot, so that it can be widened in place from the front; `dtypes` has each tensor's dtype once the header is
    read. If all tensors are of one `dtype`, they form one flat vector of it at the end of the target. The scales,
    values and indices of an encoding are put into memory of their own, `beside`, by their names in the header.

    encodings: the encodings that are accepted.
    """

    def __init__(
        self,
        manifest: Manifest,
        target: memoryview,
        length: int,
        itemsize: int = 4,
        encodings: Collection[str] = ("dense",),
    ) -> None:
        super().__init__(length, header_limit(manifest))
        limit = body_limit(manifest) if tuple(encodings) == ("dense",) else encoded_limit(manifest)
        if length > limit:
            raise MalformedTensors("the body is longer than the run's tensors can be", limit=limit)
        self.dtypes: Mapping[str, str] = {}
        self.dtype: str | None = None
        self.metadata: Mapping[str, str] = {}
        self.encoding = Encoding()
        self.beside: dict[str, Beside] = {}
        self._manifest = manifest
        self._target = target
        self._itemsize = itemsize
        self._encodings = encodings

    def _places(self, raw: bytes, data_length: int) -> Iterable[memoryview]:
        plain = parse_plain(raw, self._manifest, data_length) if "dense" in self._encodings else None
        if plain is not None:
            dtype, self.metadata = plain
            return self._land(self._manifest.derived(_plain_layout, dtype, self._itemsize))
        header, self.metadata = parse_header(raw)
        self.encoding = Encoding.of(self.metadata, self._encodings)
        entries = parse_entries(header, self._manifest, self.encoding, data_length)
        if self.encoding.name == "dense":
            return self._land(_lay_out(entries, self._manifest, self._itemsize))
        return self._land_beside(entries)

    def _land(self, layout: _Layout) -> list[memoryview]:
        self.dtypes, self.dtype = layout.dtypes, layout.dtype
        return [self._target[begin:end] for begin, end in layout.landings]

    def _land_beside(self, entries: Sequence[Entry]) -> list[memoryview]:
        self.dtypes = {entry.slot.name: entry.dtype for entry in entries if not entry.role}
        places = []
        for entry in entries:
            if entry.role:
                place = memoryview(bytearray(entry.size))
                self.beside[entry.name] = Beside(entry.dtype, place)
            else:
                end = (entry.slot.offset + entry.slot.numel) * self._itemsize
                place = self._target[end - entry.size : end]
            places.append(place)
        return places


@dataclass(frozen=True)
class _Layout:
    """Each tensor's dtype, the dtype of all if it is the same, and the byte ranges of a target that the body fills, in
    order."""

    dtypes: Mapping[str, str]
    dtype: str | None
    landings: Sequence[tuple[int, int]]


def _plain_layout(manifest: Manifest, dtype: str, itemsize: int) -> _Layout:
    """The layout of a plain header's tensors in a target of `itemsize` bytes an element."""
    return _lay_out(plain_entries(manifest, dtype), manifest, itemsize)


def _lay_out(entries: Iterable[Entry], manifest: Manifest, itemsize: int) -> _Layout:
    entries = list(entries)
    dtypes = {entry.slot.name: entry.dtype for entry in entries}
    for name, each in dtypes.items():
        if ITEMSIZE[each] > itemsize:
            raise MalformedTensors(f"the tensor {name!r} is {each}, wider than the dtype that was requested")
    found = set(dtypes.values())
    dtype = found.pop() if len(found) == 1 else None
    landings: list[tuple[int, int]] = []
    for entry in entries:
        slot, size = entry.slot, entry.size
        width = itemsize if dtype is None else ITEMSIZE[dtype]
        end = (itemsize - width) * manifest.numel + width * (slot.offset + slot.numel)
        if landings and landings[-1][1] == end - size:
            landings[-1] = (landings[-1][0], end)
        elif size:
            landings.append((end - size, end))
    return _Layout(dtypes, dtype, landings)
