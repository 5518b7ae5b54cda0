"""Host memory for one vector at a time: what bodies are received into and snapshots are sent from.

A pool holds a fixed number of vectors, made when first needed and then used again and again, so a run's memory
does not grow with the number of its workers: whoever finds none free waits in line.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import deque

import torch
from torch import Tensor

__all__ = ["Vector", "VectorPool"]


class Vector:
    """Page-aligned memory for `numel` fp32 elements, or for `room` bytes if that is more, seen as bytes and as a flat
    tensor."""

    def __init__(self, numel: int, room: int = 0) -> None:
        self.numel = numel
        size = max(4 * numel, room)
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = memoryview(memory)[:size]
        self._whole = torch.frombuffer(memory, dtype=torch.uint8)

    def tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first `numel` elements of the memory as a flat tensor of a dtype of at most 4 bytes."""
        return self.stretch(dtype, 0, self.numel)

    def stretch(self, dtype: torch.dtype, begin: int, count: int) -> Tensor:
        """`count` elements of a dtype, from byte `begin` on, which is a multiple of their size."""
        return self._whole[begin : begin + dtype.itemsize * count].view(dtype)


class VectorPool:
    """At most `capacity` vectors of `numel` elements, or of `room` bytes, lent first come, first served."""

    def __init__(self, numel: int, capacity: int, room: int = 0) -> None:
        self.numel = numel
        self.room = room
        self.capacity = capacity
        self._made = 0
        self._free: list[Vector] = []
        self._waiting: deque[asyncio.Future[Vector]] = deque()

    def try_acquire(self) -> Vector | None:
        """A vector, unless all are lent."""
        if self._free:
            return self._free.pop()
        if self._made < self.capacity:
            self._made += 1
            return Vector(self.numel, self.room)
        return None

    async def acquire(self) -> Vector:
        """A vector; its contents are unspecified."""
        vector = self.try_acquire()
        if vector is not None:
            return vector
        future: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(future.result())
            raise

    @property
    def contended(self) -> bool:
        """Whether somebody waits for a vector."""
        return any(not future.done() for future in self._waiting)

    def release(self, vector: Vector) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(vector)
                return
        self._free.append(vector)
