"""Between the socket and the commit: bodies are received into vectors, of which a shard has few."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from freestep.manifest import Manifest
from freestep.wire import Receiver
from freestep_service.aggregation import Policy
from freestep_service.ingest import Body
from freestep_service.measure import decode_and_measure
from freestep_service.optimizers import Pushed
from freestep_service.turns import HOST, Turns
from freestep_service.vectors import Vector

__all__ = ["stage", "staging_vectors"]

_SLOTS = 4
"""Pushes of a run of several shards that may be on their way at once, as lua/_prelude.lua grants them."""


def staging_vectors(policy: Policy, shards: int) -> int:
    """How many bodies a shard may receive at once.

    A run of one shard has, with a group's accumulator and two snapshots, at most batch + 3 vectors in flight.
    """
    return max(2, policy.concurrency) if shards == 1 else _SLOTS


async def stage(
    body: Body, manifest: Manifest, vector: Vector, turns: Turns, encodings: Collection[str] = ("dense",)
) -> tuple[Pushed, float | None, str]:
    """Receives a body's tensors into a vector; returns them as `decode_and_measure` does, and the digest.

    Raises MalformedTensors and MalformedRequest.
    """
    receiver = Receiver(manifest, vector.bytes, body.length, encodings=encodings)
    digest = await body.receive_into(receiver)
    if turns.needs_none(vector.device, manifest.numel):
        return *decode_and_measure(vector, manifest, receiver), digest
    # What a GPU decodes has a stream of its own there, and need not wait until others have computed.
    decode = turns.of(HOST, decode_and_measure) if vector.device == HOST else decode_and_measure
    return *await asyncio.to_thread(decode, vector, manifest, receiver), digest
