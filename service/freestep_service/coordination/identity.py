"""The identity of a Redis, by which services see whether another one's services use their storage."""

from __future__ import annotations

from freestep.errors import CoordinatorUnavailable
from freestep_service.coordination.store import Store, reachable

__all__ = ["IDENTITY_KEY", "keep_identity", "read_identity"]

IDENTITY_KEY = "freestep:identity"
"""Holds a random text; it belongs to no run. The service that starts first sets it."""


async def read_identity(store: Store) -> str | None:
    """The identity of a Redis; None if it has none, or has lost its data. Raises CoordinatorUnavailable."""
    with reachable():
        found = await store.client.get(IDENTITY_KEY)
    return None if found is None else str(found)


async def keep_identity(store: Store, identity: str) -> str:
    """Gives a Redis this identity if it has none; returns the one that it has. Raises CoordinatorUnavailable."""
    with reachable():
        await store.client.set(IDENTITY_KEY, identity, nx=True)
    found = await read_identity(store)
    if not found:
        raise CoordinatorUnavailable(f"Redis does not keep {IDENTITY_KEY}")
    return found
