"""A store that is as it was before: what a failover to a replica does that lags."""

from __future__ import annotations

from collections.abc import Mapping

from redis import Redis

__all__ = ["copied", "roll_back"]


def copied(client: Redis) -> dict[bytes, bytes]:
    """What the store holds. client: one that decodes no responses."""
    dumps = {key: client.dump(key) for key in client.keys()}
    # A lease may end between.
    return {key: value for key, value in dumps.items() if value is not None}


def roll_back(client: Redis, older: Mapping[bytes, bytes], *more: tuple[str, ...]) -> None:
    """Restores copied keys and runs more commands, in one transaction: services poll their store, and write
    missing data anew."""
    with client.pipeline(transaction=True) as stroke:
        stroke.flushall()
        for key, value in older.items():
            stroke.restore(key, 60_000 if b"lease:" in key else 0, value)
        for command in more:
            stroke.execute_command(*command)
        stroke.execute()
