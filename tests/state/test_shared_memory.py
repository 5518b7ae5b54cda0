"""Memory that a client has mapped too: bodies out of it, answers into it, and when it is free again."""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import xxhash

from freestep.api.models import ParameterSpec
from freestep.errors import MalformedTensors, MemoryNotShared
from freestep.wire.manifest import Manifest
from freestep.wire.spans import Span
from freestep_service.state.compute import DeviceLocks
from freestep_service.state.shared_memory import IS_POSSIBLE, Layout, SharedBody, SharedMemory
from shared_bodies import memory_files

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="there is no such memory on this system")

MANIFEST = Manifest([ParameterSpec(name="w", shape=(3,))])
BODY = 3 * 1024**2 + 5
"""More than is copied on the event loop, and no whole number of pieces."""


@dataclass
class Kept:
    """A sink that keeps what comes, in buffers of `size` bytes; `seen` is called with each before the next."""

    room: int
    size: int = 2**40
    seen: Callable[[], object] = lambda: None
    data: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.data = bytearray(self.room)
        self._at = 0

    def get_buffer(self) -> memoryview:
        return memoryview(self.data)[self._at : self._at + self.size]

    def buffer_updated(self, size: int) -> None:
        self._at += size
        self.seen()


@dataclass
class Ready:
    """An answer of which `reach` tells when it is there."""

    header: bytes
    data: memoryview
    sent: int = 0
    reached: list[int] = field(default_factory=list)

    async def reach(self, size: int) -> None:
        self.reached.append(size)


@dataclass
class Shared:
    """A memory, as both sides have it, and how often it was freed; `gone` is set then."""

    memory: SharedMemory
    theirs: memoryview
    freed: list[None]
    gone: asyncio.Event


@pytest.fixture
def locks() -> Iterator[DeviceLocks]:
    made = DeviceLocks()
    yield made
    made.close()


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as made:
        yield made


@pytest.fixture
def share(locks: DeviceLocks, threads: Executor) -> Callable[..., Shared]:
    def make(body: int = BODY, answer: int = BODY) -> Shared:
        layout, freed, gone = Layout.of(MANIFEST, body, answer), list[None](), asyncio.Event()

        def note() -> None:
            freed.append(None)
            gone.set()

        memory = SharedMemory(layout, locks, threads, note)
        with memory.handing_over() as descriptor:
            return Shared(memory, memoryview(mmap.mmap(descriptor, layout.size)), freed, gone)

    return make


@pytest.mark.parametrize("size", [100, 4 * 1024**2])
def test_a_body_is_copied_and_digested(share: Callable[..., Shared], size: int) -> None:
    shared, body = share(), os.urandom(BODY)
    shared.theirs[:BODY] = body
    sink = Kept(BODY, size)
    digest = asyncio.run(SharedBody(shared.memory, Span(0, BODY)).receive_into(sink))
    assert sink.data == body
    assert digest == xxhash.xxh3_128(body).hexdigest()
    assert asyncio.run(SharedBody(shared.memory, Span(0, BODY)).receive_digest()) == digest
    part = SharedBody(shared.memory, Span(7, 1000))
    assert part.length == 993
    assert asyncio.run(part.receive_digest()) == xxhash.xxh3_128(body[7:1000]).hexdigest()


def test_others_go_on_while_a_body_is_digested(share: Callable[..., Shared]) -> None:
    shared = share()

    async def main() -> None:
        digesting = asyncio.create_task(SharedBody(shared.memory, Span(0, BODY)).receive_digest())
        await asyncio.sleep(0)
        assert not digesting.done()
        await digesting

    asyncio.run(main())


def test_what_the_client_writes_meanwhile_changes_no_copy(share: Callable[..., Shared]) -> None:
    shared = share()

    def overwrite() -> None:
        shared.theirs[:BODY] = b"\xff" * BODY

    sink = Kept(BODY, BODY // 2, overwrite)
    digest = asyncio.run(shared.memory.take(Span(0, BODY), sink))
    assert sink.data == bytes(BODY // 2) + b"\xff" * (BODY - BODY // 2)
    assert digest == xxhash.xxh3_128(sink.data).hexdigest()


def test_bytes_that_are_left_over_are_refused(share: Callable[..., Shared]) -> None:
    with pytest.raises(MalformedTensors, match="left over"):
        asyncio.run(share().memory.take(Span(0, BODY), Kept(BODY - 1)))


def test_one_request_uses_it_at_a_time(share: Callable[..., Shared]) -> None:
    shared = share()

    async def main() -> None:
        first = asyncio.create_task(shared.memory.take(Span(0, BODY), Kept(BODY)))
        await asyncio.sleep(0)
        with pytest.raises(MemoryNotShared, match="another request"):
            await shared.memory.take(Span(0, BODY), Kept(BODY))
        assert await shared.memory.lay(Ready(b"", memoryview(b"1"))) is None
        await first
        await shared.memory.take(Span(0, BODY), Kept(BODY))

    asyncio.run(main())


def test_it_is_free_when_it_is_closed_and_nobody_uses_it(share: Callable[..., Shared]) -> None:
    shared = share()

    async def main() -> None:
        sink = Kept(BODY)
        use = asyncio.create_task(shared.memory.take(Span(0, BODY), sink))
        await asyncio.sleep(0)
        shared.memory.close()
        assert not shared.freed
        await use
        await asyncio.wait_for(shared.gone.wait(), 60)
        shared.memory.close()
        assert shared.freed == [None]
        with pytest.raises(MemoryNotShared, match="given up"):
            await shared.memory.take(Span(0, 1), sink)
        assert await shared.memory.lay(Ready(b"", memoryview(b"1"))) is None

    asyncio.run(main())


def test_a_use_that_is_cancelled_waits_for_its_thread(share: Callable[..., Shared]) -> None:
    shared = share()
    shared.theirs[:BODY] = body = os.urandom(BODY)

    async def main() -> None:
        sink = Kept(BODY)
        use = asyncio.create_task(shared.memory.take(Span(0, BODY), sink))
        await asyncio.sleep(0)
        use.cancel()
        with pytest.raises(asyncio.CancelledError):
            await use
        assert sink.data == body

    asyncio.run(main())


def test_tensors_of_answers_begin_at_one_place(share: Callable[..., Shared]) -> None:
    shared, data = share(), bytearray(os.urandom(BODY))
    for header in (b"h" * 8, b"header--" * 9):
        answer = Ready(header, memoryview(data))
        span = asyncio.run(shared.memory.lay(answer))
        assert span is not None
        assert span == (shared.memory.layout.tensors - len(header), shared.memory.layout.tensors + BODY)
        assert shared.theirs[span.begin : span.end] == header + data
        assert (answer.sent, answer.reached[-1]) == (BODY, BODY)


@pytest.mark.parametrize(("header", "data"), [(1, 5 * 4096), (128 * 1024, 1)])
def test_an_answer_without_room_is_not_laid(share: Callable[..., Shared], header: int, data: int) -> None:
    shared = share(answer=4 * 4096)
    shared.theirs[:BODY] = body = os.urandom(BODY)
    assert asyncio.run(shared.memory.lay(Ready(bytes(header), memoryview(bytearray(data))))) is None
    assert shared.theirs[:BODY] == body


def test_nobody_can_change_its_size(locks: DeviceLocks, threads: Executor) -> None:
    layout = Layout.of(MANIFEST, BODY, BODY)
    with SharedMemory(layout, locks, threads, lambda: None).handing_over() as descriptor:
        for size in (0, 2 * layout.size):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)


def test_when_it_was_handed_over_or_closed_no_descriptor_is_left(locks: DeviceLocks, threads: Executor) -> None:
    before, freed = memory_files(), asyncio.Semaphore(0)

    async def main() -> None:
        memory = SharedMemory(Layout.of(MANIFEST, 1, 1), locks, threads, freed.release)
        with memory.handing_over():
            pass
        memory.close()
        await freed.acquire()
        never = SharedMemory(Layout.of(MANIFEST, 1, 1), locks, threads, freed.release)
        never.close()
        await freed.acquire()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert memory_files() <= before


def test_its_pages_are_given_back_by_a_thread(locks: DeviceLocks, threads: Executor) -> None:
    async def main() -> None:
        freed = asyncio.Event()
        memory = SharedMemory(Layout.of(MANIFEST, 1, 1), locks, threads, freed.set)
        place, held = newest_mapping(), threading.Event()
        threads.submit(held.wait)
        memory.close()
        assert place in Path("/proc/self/maps").read_text() and not freed.is_set()
        held.set()
        await freed.wait()
        assert place not in Path("/proc/self/maps").read_text()

    asyncio.run(asyncio.wait_for(main(), 60))


def newest_mapping() -> str:
    """The line of a memory among this process's mappings: proc_pid_maps(5)."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:freestep" in line][-1]


def test_pages_that_the_client_takes_away_are_empty_ones(share: Callable[..., Shared]) -> None:
    shared = share()
    shared.theirs[:BODY] = os.urandom(BODY)
    pages = shared.theirs.obj
    assert isinstance(pages, mmap.mmap)
    pages.madvise(mmap.MADV_REMOVE)
    sink = Kept(BODY)
    asyncio.run(shared.memory.take(Span(0, BODY), sink))
    assert sink.data == bytes(BODY)


def test_what_cannot_be_made_leaves_no_descriptor(locks: DeviceLocks, threads: Executor) -> None:
    before = memory_files()
    with pytest.raises(OSError):
        # The system allocates no bytes.
        SharedMemory(Layout(0, 0, 0), locks, threads, lambda: None)
    assert memory_files() <= before
