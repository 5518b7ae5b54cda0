"""Host memory for one vector at a time: what bodies are received into and snapshots are sent from.

Where a shard lives on a GPU, its vectors are pinned, so that the GPU copies from them and into them by itself, and one
that a body was received into has a counterpart there, in which that becomes fp32.

A pool holds a fixed number of vectors, made when first needed and then used again and again, so a run's memory
does not grow with the number of its workers: whoever finds none free waits in line.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import weakref
from collections import deque
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from freestep_service.state.compute import HOST

__all__ = ["Vector", "VectorPool"]

logger = logging.getLogger("freestep")

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
        return self.tensor() if self.device == HOST else torch.empty(self.numel, device=self.device)

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
                torch.zeros(1, device=self.device)
            return
        # At the end of the process CUDA may be gone before this.
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False


class VectorPool:
    """At most `capacity` vectors of `numel` elements, or of `room` bytes, lent first come, first served."""

    def __init__(self, numel: int, capacity: int, room: int = 0, device: torch.device = HOST) -> None:
        self.numel = numel
        self.room = room
        self.device = device
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
            return Vector(self.numel, self.room, self.device)
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
