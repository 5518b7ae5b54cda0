"""Between the socket and the commit: bodies are received into vectors, of which a shard has few."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Protocol

from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver
from freestep_service.domain.aggregation import Policy
from freestep_service.optimizers import Pushed
from freestep_service.state.buffers import Vector
from freestep_service.state.compute import HOST, DeviceLocks
from freestep_service.state.decode import decode_and_measure

__all__ = ["Body", "stage", "staging_vectors"]

_SLOTS = 4
"""Pushes of a run of several shards that may be on their way at once, as lua/_prelude.lua grants them."""


class Body(Protocol):
    """A body of `length` bytes that has not been read."""

    length: int

    async def receive_into(self, receiver: Receiver) -> str:
        """Fills the receiver and returns the digest of the bytes. Raises MalformedTensors and MalformedRequest."""

    async def receive_digest(self) -> str:
        """Reads the body for its digest alone. Raises MalformedRequest."""


def staging_vectors(policy: Policy, shards: int) -> int:
    """How many bodies a shard may receive at once.

    A run of one shard has, with a group's accumulator and two snapshots, at most batch + 3 vectors in flight.
    """
    return max(2, policy.concurrency) if shards == 1 else _SLOTS


async def stage(
    body: Body, manifest: Manifest, vector: Vector, locks: DeviceLocks, encodings: Collection[str] = ("dense",)
) -> tuple[Pushed, float | None, str]:
    """Receives a body's tensors into a vector; returns them as `decode_and_measure` does, and the digest.

    Raises MalformedTensors and MalformedRequest.
    """
    receiver = Receiver(manifest, vector.bytes, body.length, encodings=encodings)
    digest = await body.receive_into(receiver)
    if locks.runs_inline(vector.device, manifest.numel):
        return *decode_and_measure(vector, manifest, receiver), digest
    # What a GPU decodes has a stream of its own there, and need not wait until others have computed.
    decode = locks.exclusive(HOST, decode_and_measure) if vector.device == HOST else decode_and_measure
    return *await asyncio.to_thread(decode, vector, manifest, receiver), digest
