"""From the socket into memory: a body is received straight into the places where its tensors belong.

`Body` is the seam between the web and the shard: everything before it is decided by the
claim, everything after it works on the flat vector.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import torch
import xxhash
from starlette.requests import ClientDisconnect, Request

from freestep.errors import MalformedRequest
from freestep.wire import Manifest, Receiver
from freestep_service.optimizers import norm
from freestep_service.shard import DTYPES
from freestep_service.vectors import Vector

__all__ = ["Body", "widen_and_measure"]

SLOWEST = 64 * 1024
"""Bytes a second: who sends more slowly may not hold memory that others wait for."""
_WIDENING_CHUNK = 64 * 1024


class Body:
    """A request's body that has not been read: `length` bytes.

    It may not stand still for `stall_s` seconds, nor drip: beyond those seconds it has to come at SLOWEST on average.
    """

    def __init__(self, request: Request, length: int, stall_s: float) -> None:
        self.length = length
        self._chunks = request.stream()
        self._stall_s = stall_s
        self._deadline: float | None = None

    async def receive_into(self, receiver: Receiver) -> str:
        """Fills the receiver and returns the digest of the bytes.

        Raises MalformedTensors as the receiver does, and MalformedRequest when the body ends or stalls early.
        """
        digest = xxhash.xxh3_128()
        while not receiver.complete:
            chunk = await self._next()
            digest.update(chunk)
            receiver.feed(chunk)
        return digest.hexdigest()

    async def receive_digest(self) -> str:
        """Reads the body for its digest alone; raises MalformedRequest as above."""
        digest, missing = xxhash.xxh3_128(), self.length
        while missing > 0:
            chunk = await self._next()
            digest.update(chunk)
            missing -= len(chunk)
        return digest.hexdigest()

    async def _next(self) -> bytes:
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._stall_s + self.length / SLOWEST
        try:
            async with asyncio.timeout_at(min(now + self._stall_s, self._deadline)):
                chunk = await anext(self._chunks, b"")
        except TimeoutError:
            raise MalformedRequest(f"the body stood still for {self._stall_s:g} s, or came too slowly") from None
        except ClientDisconnect:
            raise MalformedRequest("the connection was closed before the end of the body") from None
        if not chunk:
            raise MalformedRequest("the body ended before its Content-Length")
        return chunk


def widen_and_measure(
    vector: Vector, manifest: Manifest, dtypes: Mapping[str, str], *, exact: bool = False
) -> float | None:
    """Makes all tensors fp32 in place; returns the 2-norm of the whole, or None when it is not finite.

    `exact` as for `optimizers.norm`.

    A narrow tensor lies right-aligned in its slot, so widening from the front never overtakes what is yet to be
    read.
    """
    wide = vector.tensor()
    for slot in manifest.slots:
        dtype = dtypes[slot.name]
        if dtype == "F32":
            continue
        place = wide[slot.offset : slot.offset + slot.numel]
        narrow = place.view(DTYPES[dtype])[slot.numel :]
        for begin in range(0, slot.numel, _WIDENING_CHUNK):
            place[begin : begin + _WIDENING_CHUNK] = narrow[begin : begin + _WIDENING_CHUNK].to(torch.float32)
    return norm(wide, exact=exact)
