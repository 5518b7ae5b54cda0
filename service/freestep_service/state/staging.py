"""From a body to a gradient: received into a vector of the shard's, decoded and measured there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from freestep.errors import Overloaded
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver, Sink
from freestep_service.domain.aggregation import Policy
from freestep_service.optimizers import Pushed
from freestep_service.state.buffers import Hold, Vector, VectorPool
from freestep_service.state.compute import HOST, SLOWER, DeviceLocks, uninterrupted
from freestep_service.state.decode import decode_and_measure
from freestep_service.state.transfers import Transfer

__all__ = ["Body", "Staged", "Staging", "staging_vectors"]

_SLOTS = 4
"""Pushes of a run of several shards that may be on their way at once, as lua/_prelude.lua grants them."""


class Body(Protocol):
    """A body of `length` bytes that has not been read."""

    @property
    def length(self) -> int:
        """Bytes of the body."""

    async def receive_into(self, receiver: Sink) -> str:
        """Fills the receiver and returns the digest of the bytes. Raises MalformedTensors and MalformedRequest."""

    async def receive_digest(self) -> str:
        """Reads the body for its digest alone. Raises MalformedRequest."""


class Copy(Protocol):
    """Takes a copy of a body while it comes: a part of a journal, see storage/journal_parts.py."""

    def write(self, piece: memoryview) -> None:
        """Takes the next bytes, which do not change until `written` has told."""

    def written(self, done: Callable[[Exception | None], None]) -> bool:
        """Whether the memory of the bytes may change now; else `done` tells when it may."""

    def finish(self, digest: str) -> None:
        """All of the body has come."""

    def abandon(self) -> None:
        """The body has not come, or is refused."""


class _Copied:
    """A sink of whose bytes a copy is taken."""

    def __init__(self, sink: Sink, copy: Copy) -> None:
        self._sink = sink
        self._copy = copy
        self._buffer = memoryview(b"")

    def get_buffer(self) -> memoryview:
        self._buffer = self._sink.get_buffer()
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        self._sink.buffer_updated(size)
        self._copy.write(self._buffer[:size])


@dataclass(frozen=True, eq=False)
class Staged:
    """A body that was received, in the memory of a vector.

    tensors: flat [numel], as `decode_and_measure` returns them. norm: their 2-norm, None where it is not finite.
    digest: of the body's bytes. length: how many these are.
    """

    tensors: Pushed
    norm: float | None
    digest: str
    length: int
    hold: Hold = field(repr=False)
    """The memory; its owner gives it back."""


def staging_vectors(policy: Policy, shards: int) -> int:
    """How many bodies of fast peers a shard may receive at once.

    A run of one shard has, with a group's accumulator and two snapshots, at most batch + 3 vectors in flight.
    """
    return max(2, policy.concurrency) if shards == 1 else _SLOTS


class Staging:
    """Receives the bodies of one shard.

    floor: bytes a second below which a peer is slow, and its memory counted apart.
    """

    def __init__(self, manifest: Manifest, pool: VectorPool, locks: DeviceLocks, floor: float) -> None:
        self.pool = pool
        self._manifest = manifest
        self._locks = locks
        self._floor = floor

    @property
    def is_inline(self) -> bool:
        """Whether bodies are so small that they are decoded on the event loop, at once."""
        return self._locks.runs_inline(self.pool.device, self._manifest.numel)

    async def receive(
        self,
        body: Body,
        vector: Vector,
        encodings: Collection[str] = ("dense",),
        on_slow: Callable[[], None] = lambda: None,
        copy: Copy | None = None,
    ) -> Staged:
        """Receives a body's tensors into a vector of the pool, which is given back where this raises.

        on_slow: called once when the vector is counted with those of slow peers. copy: takes the body as it comes, and
        is finished, or abandoned where this raises. Raises MalformedTensors,
        MalformedRequest, and Overloaded where the peer is slow and others need the memory.
        """
        loop = asyncio.get_running_loop()
        bound = asyncio.timeout(None)
        try:
            receiver = Receiver(self._manifest, vector.bytes, body.length, encodings=encodings)
        except BaseException:
            self.pool.release(vector)
            if copy is not None:
                copy.abandon()
            raise
        transfer = Transfer(
            lambda: body.length - receiver.missing,
            loop.time,
            self._floor,
            end=lambda: bound.reschedule(loop.time()),
            on_excused=on_slow,
        )
        hold = Hold(self.pool, vector, transfer)
        try:
            try:
                async with bound:
                    digest = await body.receive_into(receiver if copy is None else _Copied(receiver, copy))
            finally:
                # What has come is written and decoded, and may wait for other shards' parts of its push.
                transfer.can_end = False
            if copy is not None:
                await _written(copy)
            tensors, norm = await self._decode(vector, receiver)
            if copy is not None:
                copy.finish(digest)
        except TimeoutError:
            _give_up(hold, copy)
            speed = f"{transfer.speed:.0f} bytes/s"
            raise Overloaded(f"the body came at {speed}, and others waited for its memory") from None
        except BaseException:
            _give_up(hold, copy)
            raise
        return Staged(tensors, norm, digest, body.length, hold)

    async def _decode(self, vector: Vector, receiver: Receiver) -> tuple[Pushed, float | None]:
        # Its indices are sorted, which may be as many as the elements.
        slower = SLOWER if receiver.encoding.name == "topk" else 1
        if self._locks.runs_inline(vector.device, slower * self._manifest.numel):
            return decode_and_measure(vector, self._manifest, receiver)
        # What a GPU decodes has a stream of its own there, and need not wait until others have computed.
        decode = self._locks.exclusive(HOST, decode_and_measure) if vector.device == HOST else decode_and_measure
        return await uninterrupted(self._locks.decoding(decode, vector, self._manifest, receiver))


async def _written(copy: Copy) -> None:
    """Returns when the memory of a body may change: decoding does that. Raises what writing failed with."""
    done: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    if not copy.written(lambda error: done.set_result(error) if not done.done() else None) and (error := await done):
        raise error


def _give_up(hold: Hold, copy: Copy | None) -> None:
    """Gives back the memory of a body, once no copy is taken of it any more."""
    if copy is None:
        hold.release()
        return
    copy.abandon()
    if copy.written(lambda _: hold.release()):
        hold.release()
