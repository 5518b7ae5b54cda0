"""Memory that a client on this machine has mapped too: bodies are copied out of it, and points into it.

The law of this file: what is looked at has been copied before. The client may write into the memory at any moment, so a
body is digested, parsed and checked where it was copied to, as one that came over a connection is; and nothing of the
service's lies in the memory but answers. Its size is sealed, so that no access can be past its end.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, Protocol, Self

import xxhash

from freestep.errors import MemoryNotShared
from freestep.wire.header import PREFIX, header_limit
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Sink, free_part
from freestep.wire.spans import Span, copy_bytes
from freestep_service.state.compute import DeviceLocks, uninterrupted

__all__ = ["IS_POSSIBLE", "Layout", "SharedBody", "SharedMemory"]

IS_POSSIBLE = sys.platform == "linux"
"""Whether this system has memory that can be sealed and sent to another process."""
_STRIDE = 16 * 1024**2
"""Bytes that a thread copies before the event loop hears of them."""
_INLINE = 256 * 1024
"""Bytes that are copied faster than a thread would begin."""
_PIECE = 256 * 1024
"""Bytes that are digested while they are in the processor's cache."""
_SCRATCH = 1024 * 1024
"""Bytes of a body that are digested at once where it is not kept: more than inline, or the event loop would not run."""


class Layout(NamedTuple):
    """What lies where: bodies within the first `body` bytes, the tensors of answers from byte `tensors` on."""

    body: int
    tensors: int
    size: int

    @classmethod
    def of(cls, manifest: Manifest, body: int, answer: int) -> Self:
        """For bodies of so many bytes, and answers with so many bytes of tensors."""
        tensors = _whole_pages(body) + _whole_pages(PREFIX + header_limit(manifest))
        return cls(body, tensors, tensors + _whole_pages(answer))


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class Answer(Protocol):
    """A body that is ready to send, or is being made: see `snapshots.PointBody`."""

    header: bytes
    data: memoryview
    sent: int

    async def reach(self, size: int) -> None:
        """Returns when the first `size` bytes of the data are there."""


class SharedMemory:
    """One memory, from when it is made until it is closed and nobody uses it; `freed` is called when it is gone then.

    threads: give its pages back. These are there when it has been made, which takes a moment: call it in a thread.
    Raises OSError.
    """

    def __init__(self, layout: Layout, locks: DeviceLocks, threads: Executor, freed: Callable[[], None]) -> None:
        self.layout = layout
        self._locks = locks
        self._threads = threads
        self._freed = freed
        self._is_used = self._is_closed = False
        self._descriptor = os.memfd_create("freestep", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, layout.size)
            # Pages are made here, where want of them may be told, and not by an access, which would end the process.
            # But the system may count on memory that it has not: who calls measures what is there before.
            os.posix_fallocate(self._descriptor, 0, layout.size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
            self._bytes = memoryview(mmap.mmap(self._descriptor, layout.size))
        except BaseException:
            self._close_descriptor()
            raise

    @contextmanager
    def handing_over(self) -> Iterator[int]:
        """Its descriptor, for the client; once."""
        try:
            yield self._descriptor
        finally:
            self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def close(self) -> None:
        """Lets it go, when who uses it has finished."""
        if not self._is_closed:
            self._is_closed = True
            self._close_descriptor()
            self._free()

    def _free(self) -> None:
        if self._is_closed and not self._is_used:
            pages, self._bytes = self._bytes, memoryview(b"")
            # A gigabyte takes the system the better part of a second.
            gone = asyncio.get_running_loop().run_in_executor(self._threads, pages.release)
            gone.add_done_callback(lambda _: self._freed())

    @contextmanager
    def _used(self) -> Iterator[memoryview]:
        if self._is_closed:
            raise MemoryNotShared("the memory has been given up")
        if self._is_used:
            raise MemoryNotShared("another request is using the memory")
        self._is_used = True
        try:
            yield self._bytes
        finally:
            self._is_used = False
            self._free()

    async def take(self, span: Span, sink: Sink) -> str:
        """Copies a body into a sink, and returns the digest of the bytes that this now has.

        Raises what the sink raises, MalformedTensors if that has no room, and MemoryNotShared where the memory was
        closed or another request uses it.
        """
        digest = xxhash.xxh3_128()
        with self._used() as memory:
            at = span.begin
            while at < span.end:
                buffer = free_part(sink)
                size = min(len(buffer), span.end - at, _STRIDE)
                await self._run(size, _take, buffer[:size], memory[at : at + size], digest)
                sink.buffer_updated(size)
                at += size
        return digest.hexdigest()

    async def lay(self, answer: Answer) -> Span | None:
        """Copies an answer to its place; None where it has no room there, or the memory is closed or in use.

        Raises what made the answer fail.
        """
        layout, size = self.layout, len(answer.data)
        begin = layout.tensors - len(answer.header)
        if self._is_closed or self._is_used or begin < layout.body or layout.tensors + size > layout.size:
            return None
        with self._used() as memory:
            memory[begin : layout.tensors] = answer.header
            place = memory[layout.tensors :]
            for at, until in pairwise([*range(0, size, _STRIDE), size]):
                await answer.reach(until)
                await self._run(until - at, copy_bytes, place[at:until], answer.data[at:until])
                answer.sent = until
        return Span(begin, layout.tensors + size)

    async def _run(self, size: int, function: Callable[..., None], *arguments: object) -> None:
        if size <= _INLINE:
            function(*arguments)
        else:
            # Neither memory is given back while a thread is still at it.
            await uninterrupted(self._locks.decoding(function, *arguments))


def _take(target: memoryview, source: memoryview, digest: xxhash.xxh3_128) -> None:
    for at in range(0, len(target), _PIECE):
        piece = target[at : at + _PIECE]
        copy_bytes(piece, source[at : at + _PIECE])
        digest.update(piece)


class SharedBody:
    """A body that lies in a memory, within its first `layout.body` bytes: see `staging.Body`."""

    def __init__(self, memory: SharedMemory, span: Span) -> None:
        self.length = span.length
        self._memory = memory
        self._span = span

    async def receive_into(self, receiver: Sink) -> str:
        """As `SharedMemory.take`."""
        return await self._memory.take(self._span, receiver)

    async def receive_digest(self) -> str:
        """The digest of a copy that is not kept; raises MemoryNotShared."""
        return await self._memory.take(self._span, _Scratch())


class _Scratch:
    """A sink that keeps nothing."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_SCRATCH))

    def get_buffer(self) -> memoryview:
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        pass
