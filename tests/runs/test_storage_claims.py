"""Claims on storage: services of one Redis share it, and those of another are refused while anybody is live."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
from redis import Redis

import forked
from freestep.errors import StorageUnavailable
from freestep_service.coordination.identity import IDENTITY_KEY
from freestep_service.coordination.store import Store
from freestep_service.runs.storage_claims import StorageClaims
from freestep_service.storage.claims import Claim, DirectoryClaim, ObjectClaim, StorageInUse
from freestep_service.storage.media import open_storage
from harness import ProcessService, ThreadService
from harness import store as started
from in_process import Medium
from meanwhile import wait_until
from plain_calls import Api, slug

KINDS = ["directory", "objects"]


class Scene:
    """Services with one of two Redises, on one place, under a clock of their own."""

    def __init__(self, kind: str, folder: Path, urls: list[str]) -> None:
        self.urls = urls
        self.now = 100.0
        self._kind = kind
        self._folder = folder
        self.objects = open_storage(f"memory://{uuid.uuid4()}")
        self.lock = folder / "lock"
        self.lost: list[StorageInUse] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()

    def claim(self) -> Claim:
        if self._kind == "directory":
            return DirectoryClaim(self._folder)
        return ObjectClaim(self.objects, uuid.uuid4().hex)

    async def service(self, stack: AsyncExitStack, redis: int, claim: Claim | None = None) -> StorageClaims:
        store = await Store.connect(self.urls[redis])
        stack.push_async_callback(store.close)
        claims = StorageClaims(
            store, [claim or self.claim()], on_lost=self.lost.append, clock=self.clock, sleep=self.sleep
        )
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


@pytest.mark.parametrize("scene", ["directory"], indirect=True)
@pytest.mark.parametrize("is_fast", [False, True])
def test_a_lock_whose_file_was_removed_is_taken_again(scene: Scene, is_fast: bool) -> None:
    """As by somebody who takes it for one that a killed service has left. is_fast: whether a service with another Redis
    starts before that is seen."""

    async def work() -> None:
        async with AsyncExitStack() as stack:
            one, two = await scene.service(stack, 0), await scene.service(stack, 0)
            scene.lock.unlink()
            if is_fast:
                other = await scene.service(stack, 1)
            scene.now += 6
            for each in (one, two):
                await each.beat()
            if is_fast:
                assert len(scene.lost) == 2
                for each in (one, two):
                    with pytest.raises(StorageUnavailable, match="with another Redis"):
                        each.require()
                other.require()
            else:
                assert scene.lost == []
                one.require()
                with pytest.raises(StorageInUse):
                    async with AsyncExitStack() as refused:
                        await scene.service(refused, 1)

    asyncio.run(work())


@pytest.mark.parametrize("scene", ["directory"], indirect=True)
def test_a_directory_that_is_away_is_claimed_when_it_is_back(scene: Scene) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            one = await scene.service(stack, 0)
            elsewhere = scene.lock.parent.rename(scene.lock.parent.with_name("elsewhere"))
            scene.now += 6
            await one.beat()
            scene.lock.parent.mkdir()
            await one.beat()
            one.require()
            assert scene.lock.read_text() == (elsewhere / "lock").read_text() == identities(scene)[0]

    asyncio.run(work())


@pytest.mark.parametrize("scene", ["directory"], indirect=True)
def test_a_file_system_whose_locks_fail_is_told_of_in_words(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As NFS does without its lock daemon, and for a file that its server knows no more."""

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    async def work() -> None:
        async with AsyncExitStack() as stack:
            one = await scene.service(stack, 0)
            for call in ("fcntl.flock", "os.pread"):
                with monkeypatch.context() as failing:
                    failing.setattr(call, fail)
                    scene.now += 6
                    await one.beat()
                one.require()
            with monkeypatch.context() as failing:
                failing.setattr("fcntl.flock", fail)
                two = await scene.service(stack, 0)
                with pytest.raises(StorageUnavailable, match="is not claimed yet"):
                    two.require()
            await two.beat()
            two.require()

    asyncio.run(work())
    assert "cannot be claimed: No locks available" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("scene", ["objects"], indirect=True)
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


@pytest.mark.parametrize("scene", ["objects"], indirect=True)
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


@pytest.mark.parametrize("scene", ["objects"], indirect=True)
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


def two_stores(stack: ExitStack, tmp_path: Path) -> list[str]:
    """The URLs of two stores that know nothing of each other."""
    urls = []
    for name in ("redis-1", "redis-2"):
        (tmp_path / name).mkdir()
        urls.append(stack.enter_context(started("valkey", tmp_path / name)))
    return urls


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
