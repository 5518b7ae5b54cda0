"""Host memory for one vector at a time: bodies are received into it and snapshots are sent from it.

Where a shard lives on a GPU, its vectors are pinned, so that the GPU copies from them and into them by itself, and one
that a body was received into has a counterpart there, in which that becomes fp32.

A pool has room for a number of vectors, made when first needed and then reused, so a run's memory does not grow with
the number of its workers: a caller that finds none free waits in line. A vector that a slow peer holds is counted
apart, in a reserve for slow peers, and another takes its place; when it comes back, it is one too many, and its memory
is given back. Where the reserve is used up and callers wait, the slowest transfer ends.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from freestep.errors import Overloaded
from freestep_service.state.compute import HOST

__all__ = ["Hold", "Holder", "Reserve", "Vector", "VectorPool", "memory_of"]

logger = logging.getLogger("freestep")

_LOOK_S = 0.02
"""Seconds between two looks at the speed of those that hold vectors."""
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all of the process's GPUs."""


class Vector:
    """Page-aligned memory for `numel` fp32 elements, or for `room` bytes if that is more, seen as bytes and as a flat
    tensor; `device` is where what lies in it goes or comes from."""

    def __init__(self, numel: int, room: int = 0, device: torch.device = HOST) -> None:
        self.numel = numel
        self.device = device
        size = max(4 * numel, room)
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = memoryview(memory)[:size]
        self._whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._is_pinned = device.type != "cuda"

    def tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first `numel` elements of the memory as a flat tensor of a dtype of at most 4 bytes."""
        return self.stretch(dtype, 0, self.numel)

    def stretch(self, dtype: torch.dtype, begin: int, count: int) -> Tensor:
        """`count` elements of a dtype, from byte `begin` on, which is a multiple of their size."""
        return self._whole[begin : begin + dtype.itemsize * count].view(dtype)

    @cached_property
    def wide(self) -> Tensor:
        """What a body becomes: fp32, flat [numel], on the device; on the host that is the memory itself."""
        if self.device == HOST:
            return self.tensor()
        return torch.empty(self.numel, dtype=torch.float32, device=self.device)

    def pin(self) -> None:
        """Lets a GPU at the memory by itself. Whoever is about to copy calls it, off the event loop: the first time,
        all pages have to be there."""
        if self._is_pinned:
            return
        self._is_pinned = True
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = self._whole.data_ptr()
        if error := int(runtime.cudaHostRegister(address, self._whole.nbytes, _PORTABLE)):
            logger.warning("%d bytes cannot be pinned (CUDA error %d): copies are slower", self._whole.nbytes, error)
            # CUDA tells of it again at the next launch.
            with suppress(RuntimeError):
                torch.zeros(1, dtype=torch.float32, device=self.device)
            return
        # At the end of the process CUDA may be gone before this.
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False


class Holder(Protocol):
    """Who holds a vector: a transfer, or the readers of a snapshot."""

    def is_slow(self) -> bool:
        """Whether the peer is so slow that its memory is counted apart."""

    @property
    def speed(self) -> float:
        """Bytes a second."""

    @property
    def can_end(self) -> bool:
        """Whether there is a transfer that may be ended."""

    def end(self) -> None:
        """Ends the transfer; the vector is released soon after."""

    def on_excused(self) -> None:
        """The vector is counted apart from now on."""


class Reserve(Protocol):
    """Memory for what slow peers hold."""

    def try_reserve(self, size: int) -> bool:
        """Takes `size` bytes of it, if they are there."""

    def release(self, size: int) -> None:
        """Gives them back."""


class VectorPool:
    """`capacity` vectors of `numel` elements, or of `room` bytes, lent first come, first served, on one event loop.

    reserve: from which vectors that slow peers hold are counted; without one, they count as the others do.
    """

    def __init__(
        self,
        numel: int,
        capacity: int,
        room: int = 0,
        device: torch.device = HOST,
        reserve: Reserve | None = None,
    ) -> None:
        self.numel = numel
        self.room = room
        self.device = device
        self.capacity = capacity
        self.pressed: Callable[[], bool] = lambda: False
        """Whether callers wait elsewhere for a vector of this pool."""
        self.on_shrunk: Callable[[], None] = lambda: None
        """Called when the last vector is given back that a smaller capacity has no room for."""
        self._is_shrinking = False
        self._reserve = reserve
        self._made = 0
        self._free: list[Vector] = []
        self._waiting: deque[asyncio.Future[Vector]] = deque()
        self.is_held_by_slow_peers = False
        """Whether slow peers hold all vectors, and the reserve has no room for theirs: none will be free soon."""
        self._holders: dict[Holder, bool] = {}
        """Those whose speed is watched, and whether their vector is counted apart."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def size(self) -> int:
        """Bytes of a vector."""
        return max(4 * self.numel, self.room)

    @property
    def most(self) -> int:
        """How many vectors there are or may be, without those that are counted apart."""
        return max(self._made, self.capacity)

    def resize(self, capacity: int) -> None:
        """Has room for so many vectors from here on; those in use that are too many leave when they are released."""
        self.capacity = capacity
        while self._free and self._made > capacity:
            self._free.pop()
            self._made -= 1
        self._is_shrinking = self._made > capacity
        self._serve()

    def try_acquire(self) -> Vector | None:
        """A vector, unless all are lent. Raises Overloaded where the machine has no memory for one."""
        if self._free:
            return self._free.pop()
        if self._made >= self.capacity:
            return None
        try:
            vector = Vector(self.numel, self.room, self.device)
        except (OSError, MemoryError) as error:
            raise Overloaded(f"the machine has no memory for a body: {error}") from error
        self._made += 1
        return vector

    async def acquire(self, timeout_s: float) -> Vector:
        """A vector; its contents are unspecified. Raises Overloaded when none is free in time."""
        vector = self.try_acquire()
        if vector is not None:
            return vector
        future: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            self._withdraw(future)
            raise Overloaded(f"no memory for a body was free within {timeout_s:.3g} s") from None
        except asyncio.CancelledError:
            self._withdraw(future)
            raise

    def _withdraw(self, future: asyncio.Future[Vector]) -> None:
        """Ends a wait; a vector that came at the same moment goes to the next in line."""
        if future.done() and not future.cancelled() and future.exception() is None:
            self.release(future.result())
        with suppress(ValueError):
            self._waiting.remove(future)

    @property
    def contended(self) -> bool:
        """Whether callers wait for a vector."""
        return any(not future.done() for future in self._waiting) or self.pressed()

    def watch(self, holder: Holder) -> None:
        """Watches the speed of a vector's holder until it is released with the vector."""
        self._holders[holder] = False
        if self._timer is None and self._reserve is not None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def unwatch(self, holder: Holder) -> None:
        """Watches a holder no more; a vector that was counted apart counts as the others do."""
        self.is_held_by_slow_peers = False
        if self._holders.pop(holder, False):
            assert self._reserve is not None
            self._reserve.release(self.size)
            self._made += 1

    def release(self, vector: Vector, holder: Holder | None = None) -> None:
        """Takes a vector back."""
        if holder is not None:
            self.unwatch(holder)
        if self._made > self.capacity:
            self._made -= 1
            if self._is_shrinking and self._made == self.capacity:
                self._is_shrinking = False
                self.on_shrunk()
            return
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(vector)
                return
        self._free.append(vector)

    def _look(self) -> None:
        self._timer = None
        slow = [holder for holder, apart in self._holders.items() if not apart and holder.is_slow()]
        left = [holder for holder in slow if not self._count_apart(holder)]
        counted = [holder for holder, apart in self._holders.items() if not apart]
        self.is_held_by_slow_peers = bool(left) and len(left) == len(counted) >= self.capacity
        ending = [holder for holder in left if holder.can_end]
        if ending and self.contended:
            slowest = min(ending, key=lambda holder: holder.speed)
            logger.warning("a peer that moves %.0f bytes/s is ended: others wait for its memory", slowest.speed)
            slowest.end()
        if any(not apart for apart in self._holders.values()):
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _count_apart(self, holder: Holder) -> bool:
        """Counts a holder's vector in the reserve, so that another may be made; whether there was room for it."""
        if self._reserve is None or not self._reserve.try_reserve(self.size):
            return False
        self._holders[holder] = True
        self._made -= 1
        holder.on_excused()
        self._serve()
        return True

    def _serve(self) -> None:
        """Makes a vector for the first who waits, if there may be one more."""
        while self._waiting and self._made < self.capacity:
            future = self._waiting.popleft()
            if future.done():
                continue
            try:
                vector = self.try_acquire()
            except Overloaded as error:
                future.set_exception(error)
                return
            assert vector is not None
            future.set_result(vector)


class Hold:
    """A vector that is in use, and whose holder is watched; its owner gives it back once."""

    def __init__(self, pool: VectorPool, vector: Vector, holder: Holder) -> None:
        self.vector = vector
        self._pool = pool
        self._holder = holder
        pool.watch(holder)

    def release(self) -> None:
        """Gives the vector back to its pool."""
        self._pool.release(self.vector, self._holder)


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a flat fp32 tensor on the CPU."""
    assert tensor.dtype == torch.float32 and tensor.is_contiguous(), "state vectors are flat fp32"
    # The memory of an empty array cannot be cast.
    return tensor.numpy().data.cast("B") if tensor.numel() else memoryview(b"")
