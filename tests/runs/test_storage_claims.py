"""Claims on storage: services of one Redis share it, and those of another are refused while anybody is live."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
from redis import Redis

import forked
from freestep_service.coordination.identity import IDENTITY_KEY
from freestep_service.coordination.store import Store
from freestep_service.runs.storage_claims import StorageClaims
from freestep_service.storage.claims import Claim, DirectoryClaim, ObjectClaim, StorageInUse
from freestep_service.storage.media import open_storage
from harness import ProcessService, ThreadService
from harness import store as started
from meanwhile import wait_until
from plain_calls import Api

KINDS = ["directory", "objects"]


class Scene:
    """Services with one of two Redises, on one place, under a clock of their own."""

    def __init__(self, kind: str, folder: Path, urls: list[str]) -> None:
        self.urls = urls
        self.now = 100.0
        self._kind = kind
        self._folder = folder
        self._objects = open_storage(f"memory://{uuid.uuid4()}")
        self.meanwhile: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()

    def claim(self) -> Claim:
        if self._kind == "directory":
            return DirectoryClaim(self._folder)
        return ObjectClaim(self._objects, uuid.uuid4().hex)

    async def service(self, stack: AsyncExitStack, redis: int, claim: Claim | None = None) -> StorageClaims:
        store = await Store.connect(self.urls[redis])
        stack.push_async_callback(store.close)
        claims = StorageClaims(store, [claim or self.claim()], clock=self.clock, sleep=self.sleep)
        return await stack.enter_async_context(claims)


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    with ExitStack() as stack:
        urls = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            urls.append(stack.enter_context(started("valkey", tmp_path / name)))
        (tmp_path / "data").mkdir()
        yield Scene(request.param, tmp_path / "data", urls)


def identities(scene: Scene) -> list[str | None]:
    found = []
    for url in scene.urls:
        with Redis.from_url(url, decode_responses=True) as client:
            found.append(client.get(IDENTITY_KEY))
    return found


both = pytest.mark.parametrize("scene", KINDS, indirect=True)


@both
def test_services_of_one_redis_share_a_place_and_those_of_another_are_refused(scene: Scene) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            one = await scene.service(stack, 0)
            await scene.service(stack, 0)
            beats = []
            # The first goes on, of which the other hears when it has waited for a while.
            scene.meanwhile = lambda: beats.append(asyncio.ensure_future(one.beat()))
            for _ in range(2):
                with pytest.raises(StorageInUse, match="with another Redis"):
                    async with AsyncExitStack() as refused:
                        await scene.service(refused, 1)
            await asyncio.gather(*beats)
            scene.meanwhile = lambda: None
            await scene.service(stack, 0)
        # In order: nobody waits.
        before = scene.now
        async with AsyncExitStack() as stack:
            await scene.service(stack, 1)
        assert scene.now == before

    asyncio.run(work())


@both
def test_a_place_of_services_that_died_goes_to_another_redis(scene: Scene) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            claim = scene.claim()
            dead = await scene.service(stack, 0, claim)
            if isinstance(claim, DirectoryClaim):
                # As the system does.
                claim.release()
            before = scene.now
            async with AsyncExitStack() as other:
                await scene.service(other, 1)
                assert scene.now - before < 30
            del dead

    asyncio.run(work())


@both
def test_a_redis_that_lost_its_data_gets_its_identity_again(scene: Scene) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            one, two = await scene.service(stack, 0), await scene.service(stack, 0)
            before = identities(scene)[0]
            with Redis.from_url(scene.urls[0]) as client:
                client.flushall()
            # One that starts before anybody has noticed waits for those who are live.
            beats: list[asyncio.Future[None]] = []
            scene.meanwhile = lambda: beats.append(asyncio.ensure_future(two.beat()))
            three = await scene.service(stack, 0)
            scene.meanwhile = lambda: None
            for each in (one, three):
                await each.beat()
            await asyncio.gather(*beats)
            assert identities(scene)[0] == before is not None

    asyncio.run(work())


@both
def test_claims_follow_a_redis_that_has_another_identity(scene: Scene) -> None:
    """It lost its data, and somebody with storage of another place was the first to start."""

    async def work() -> None:
        async with AsyncExitStack() as stack:
            one, two = await scene.service(stack, 0), await scene.service(stack, 0)
            with Redis.from_url(scene.urls[0]) as client:
                client.set(IDENTITY_KEY, "f" * 32)
            await one.beat()
            await two.beat()
            await scene.service(stack, 0)
            assert identities(scene)[0] == "f" * 32

    asyncio.run(work())


@pytest.mark.parametrize("scene", ["objects"], indirect=True)
def test_who_took_a_place_of_which_the_first_was_away_is_named(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            one, two = await scene.service(stack, 0), await scene.service(stack, 1)
            for _ in range(3):
                scene.now += 6
                await one.beat()
                await two.beat()

    asyncio.run(work())
    assert caplog.text.count("with another Redis, and each would overwrite the other's runs") == 2


@pytest.mark.slow
@pytest.mark.parametrize("place", ["data directory", "checkpoint path", "checkpoint URL"])
def test_two_services_with_a_redis_each_do_not_share_storage(
    start_process: Callable[..., ProcessService],
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    tmp_path: Path,
    place: str,
) -> None:
    with ExitStack() as stack:
        urls = []
        for name in ("redis-1", "redis-2"):
            (tmp_path / name).mkdir()
            urls.append(stack.enter_context(started("valkey", tmp_path / name)))
        dirs = [tmp_path / "data"] * 2 if place == "data directory" else [tmp_path / "data-1", tmp_path / "data-2"]
        kept = {"checkpoint path": f"{tmp_path}/kept", "checkpoint URL": f"local://{tmp_path}/kept"}.get(place)
        its = {} if kept is None else {"checkpoint_url": kept}
        first = start_process(dirs[0], redis_url=urls[0], **its)
        api = connect(first.url)
        api.create()
        assert api.push(api.lease(), 0).json()["step"] == 1
        flags = [] if kept is None else ["--checkpoint-url", kept]
        flags += ["--port", "0", "--data-dir", str(dirs[1])]
        for store in (["--redis-url", urls[1]], [] if kept else ["--redis-url", urls[1]]):
            refused = forked.freestep("serve", *flags, *store)
            assert refused.returncode == 1
            assert "with another Redis" in refused.stderr and "end it, name its Redis with redis_url" in refused.stderr
        # One that shares its Redis is let in.
        sharing = start_service(dirs[1], redis_url=urls[0], **its)
        # A Redis that forgets everything is given its identity again.
        with Redis.from_url(urls[0], decode_responses=True) as client:
            before = client.get(IDENTITY_KEY)
            client.flushall()
            wait_until(lambda: client.get(IDENTITY_KEY) == before)
        sharing.stop()
        first.stop()
        second = start_service(dirs[1], redis_url=urls[1], **its)
        api = connect(second.url, api.run)
        wait_until(lambda: api.http.get(api.path("/parameters")).status_code == 200)
        assert api.status()["step"] == 1
        api.http.delete(api.path())
