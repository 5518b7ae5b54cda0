"""What a Redis holds as commands that make it anew, one a line, as JSON: for any server, and to be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redis import Redis

__all__ = ["load", "save"]


def save(redis: Redis, file: Path) -> None:
    """Writes all keys, in their order, without those that pass within a second."""
    file.write_text("".join(json.dumps(command) + "\n" for command in _commands(redis)))


def load(redis: Redis, file: Path) -> None:
    """Makes the keys in an empty Redis, as they were."""
    for line in file.read_text().splitlines():
        redis.execute_command(*json.loads(line))


def _commands(redis: Redis) -> Iterator[list[Any]]:
    client: Any = redis
    for key in sorted(client.keys()):
        kind = client.type(key)
        if kind == "string" and client.pttl(key) < 0:
            yield ["SET", key, client.get(key)]
        elif kind == "hash":
            yield ["HSET", key, *_flat(sorted(client.hgetall(key).items()))]
        elif kind == "list":
            yield ["RPUSH", key, *client.lrange(key, 0, -1)]
        elif kind == "set":
            yield ["SADD", key, *sorted(client.smembers(key))]
        elif kind == "zset":
            yield [
                "ZADD",
                key,
                *_flat((repr(score), member) for member, score in client.zrange(key, 0, -1, withscores=True)),
            ]
        elif kind == "stream":
            for entry, fields in client.xrange(key):
                yield ["XADD", key, entry, *_flat(fields.items())]
        if kind in ("hash", "list", "zset") and client.pttl(key) >= 0:
            yield ["PEXPIREAT", key, client.execute_command("PEXPIRETIME", key)]


def _flat(pairs: Any) -> list[Any]:
    return [value for pair in pairs for value in pair]
