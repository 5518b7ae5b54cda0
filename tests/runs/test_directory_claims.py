"""Claims on a directory: a lock of its file system, which may be removed, be away or fail."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import AsyncExitStack

import pytest

from freestep.errors import StorageUnavailable
from freestep_service.storage.claims import StorageInUse
from runs.claim_scene import Scene, identities

pytestmark = pytest.mark.parametrize("scene", ["directory"], indirect=True)


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
