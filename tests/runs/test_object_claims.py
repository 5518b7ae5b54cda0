"""Claims on an object store: a file for each service, which it writes again and again, and others look at."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis import Redis

from freestep.errors import StorageUnavailable
from freestep_service.coordination.identity import IDENTITY_KEY
from freestep_service.storage.claims import ObjectClaim
from in_process import Medium
from runs.claim_scene import Scene, identities

pytestmark = pytest.mark.parametrize("scene", ["objects"], indirect=True)


def test_nothing_is_written_while_another_is_live_at_the_place(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """One whose start could not see the first, say."""

    async def work() -> None:
        async with AsyncExitStack() as stack:
            one = await scene.service(stack, 0)
            for content in (b"first", b"second"):
                one.require()
                scene.objects.write("claims/other.service", [content])
                scene.now += 6
                await one.beat()
            with pytest.raises(StorageUnavailable, match="with another Redis"):
                one.require()
            assert one.problem is not None
            scene.now += 6
            await one.beat()
            one.require()
            assert (one.problem, scene.lost) == (None, [])

    asyncio.run(work())
    assert caplog.text.count("until then nothing is written there") == 1


@pytest.mark.parametrize("is_used", [False, True])
def test_a_place_that_cannot_be_written_at_the_start_is_claimed_when_it_can(
    scene: Scene, is_used: bool, tmp_path: Path
) -> None:
    async def work() -> None:
        medium = Medium(tmp_path / "medium")
        async with AsyncExitStack() as stack:
            medium.is_full = True
            one = await scene.service(stack, 0, ObjectClaim(medium, "one"))
            with pytest.raises(StorageUnavailable, match="is not claimed yet"):
                one.require()
            medium.is_full = False
            # A Redis of earlier services, of which one was killed.
            medium.write("claimed-by", [b"earlier"])
            medium.write("claims/earlier.service", [b"content"])
            for second in range(30):
                scene.now += 1
                if is_used:
                    medium.write("claims/earlier.service", [b"%d" % second])
                await one.beat()
            if is_used:
                assert len(scene.lost) == 1
                with pytest.raises(StorageUnavailable, match="with another Redis"):
                    one.require()
            else:
                one.require()
                assert medium.read("claimed-by").decode() == identities(scene)[0]

    asyncio.run(work())


def test_a_service_that_does_not_hear_of_its_redis_other_identity_loses_nothing(scene: Scene) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            one = await scene.service(stack, 0)
            scene.objects.write("claimed-by", [b"f" * 32])
            with Redis.from_url(scene.urls[0]) as client:
                client.set(IDENTITY_KEY, "f" * 32)
                client.config_set("maxmemory", 1)
                scene.now += 6
                await one.beat()
                client.config_set("maxmemory", 0)
            await one.beat()
            assert (one.problem, scene.lost) == (None, [])
            one.require()

    asyncio.run(work())
