"""Claims on storage: services of one Redis share it, and those of another are refused while anybody is live."""

from __future__ import annotations

import asyncio
import fcntl
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
from redis import Redis

import forked
from freestep.errors import StorageUnavailable
from freestep_service.coordination.identity import IDENTITY_KEY
from freestep_service.storage.claims import DirectoryClaim, StorageInUse
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from plain_calls import Api, slug
from runs.claim_scene import Scene, identities, two_stores

both = pytest.mark.parametrize("scene", ["directory", "objects"], indirect=True)


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


@both
def test_who_was_away_while_another_took_the_place_has_lost_it(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            claim = scene.claim()
            one = await scene.service(stack, 0, claim)
            one.require()
            if isinstance(claim, DirectoryClaim):
                # As where locks do not reach other hosts.
                fcntl.flock(claim._file, fcntl.LOCK_UN)
            else:
                scene.now += 16
                with pytest.raises(StorageUnavailable, match="was not renewed in time"):
                    one.require()
            two = await scene.service(stack, 1)
            scene.lost.clear()
            for _ in range(3):
                scene.now += 6
                await one.beat()
                await two.beat()
                two.require()
            (lost,) = scene.lost
            assert "with another Redis, and each would overwrite the other's runs" in str(lost)
            assert (one.problem, two.problem) == (str(lost), None)
            with pytest.raises(StorageUnavailable, match="with another Redis"):
                one.require()

    asyncio.run(work())
    assert caplog.text.count("nothing is written there any more") == 1


@pytest.mark.slow
def test_a_service_that_was_stopped_while_another_took_its_storage_ends(
    start_process: Callable[..., ProcessService],
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        urls = two_stores(stack, tmp_path)
        kept = f"local://{tmp_path}/kept"
        first = start_process(tmp_path / "data-1", redis_url=urls[0], checkpoint_url=kept)
        api = connect(first.url)
        api.create()
        lease = api.lease()
        assert [api.push(lease, step).json()["step"] for step in range(3)] == [1, 2, 3]
        assert api.http.post(api.path("/checkpoints")).json()["step"] == 3
        assert api.push(lease, 3).json()["step"] == 4
        first.send_signal(signal.SIGSTOP)
        second = start_service(tmp_path / "data-2", redis_url=urls[1], checkpoint_url=kept)
        mine = connect(second.url, api.run)
        wait_until(lambda: mine.http.get(mine.path("/parameters")).status_code == 200)
        assert mine.push(mine.lease(), 3).json()["step"] == 4
        assert mine.http.post(mine.path("/checkpoints")).json()["step"] == 4
        files = {path: path.read_bytes() for path in (tmp_path / "kept" / "runs").rglob("*") if path.is_file()}
        first.send_signal(signal.SIGCONT)
        assert first.process is not None
        forked.join(first.process)
        assert first.process.exitcode == 1
        # It has written no last checkpoint.
        assert files == {path: path.read_bytes() for path in (tmp_path / "kept" / "runs").rglob("*") if path.is_file()}
        assert mine.push(mine.lease(), 4).json()["step"] == 5
        assert mine.http.get("/readyz").status_code == 200
        mine.http.delete(mine.path())


@pytest.mark.slow
def test_readyz_and_writes_are_refused_while_another_is_live_there(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], valkey_url: str, tmp_path: Path
) -> None:
    service = start_service(redis_url=valkey_url, checkpoint_url=f"local://{tmp_path}/kept")
    api = connect(service.url)
    api.create()
    lease, numbers = api.lease(), iter(range(10**6))

    def is_refused() -> bool:
        (tmp_path / "kept" / "claims" / "other.service").write_text(str(next(numbers)))
        return api.http.get("/readyz").status_code == 507

    wait_until(is_refused, 0.1)
    assert slug(api.http.get("/readyz")) == "storage-unavailable"
    for refused in (api.http.post(api.path("/checkpoints")), api.http.put("/v1/runs/another", json=api.spec())):
        assert slug(refused) == "storage-unavailable"
        assert "another service uses" in refused.json()["detail"]
    # What needs no storage goes on.
    assert api.push(lease, 0).json()["step"] == 1
    wait_until(lambda: api.http.get("/readyz").status_code == 200)
    assert api.http.post(api.path("/checkpoints")).json()["step"] == 1
    service.stop()


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
        urls = two_stores(stack, tmp_path)
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
