"""The history of a run in memory and in storage, with storage that fails when the test says so, and clocks it sets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from freestep.errors import StorageUnavailable
from freestep_service.domain.events import Event, Place
from freestep_service.domain.records import Origin
from freestep_service.runs.history import RunHistory
from freestep_service.runs.resources import Disk
from freestep_service.storage.local import LocalStorage

FILE = Path("histories/run.json")


class FailingStorage(LocalStorage):
    """A directory that cannot be read or written for as long as `fails`."""

    fails = False
    answers: threading.Event | None = None
    """Before it is set, nothing can be read."""

    def _read(self, path: str) -> bytes:
        if self.fails:
            raise OSError(5, "out of order")
        if self.answers is not None:
            assert self.answers.wait(60)
        return super()._read(path)

    def _write(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        if self.fails:
            raise OSError(5, "out of order")
        super()._write(path, pieces)


class Scene:
    """One run's storage, and its histories from process to process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.storage = FailingStorage(root)
        self.disk = Disk()
        self.now = 1000.0
        self.seq = 0
        self.patience_s = 60.0

    @asynccontextmanager
    async def owner(self) -> AsyncIterator[RunHistory]:
        """A process that owns the first shard, and is killed."""
        history = RunHistory(
            self.storage, self.disk, "run", Origin(1, "id"), lambda: self.now, lambda: self.now, self.patience_s
        )
        await history.begin()
        yield history

    def push(self, history: RunHistory) -> None:
        self.seq += 1
        self.now += 0.5
        members = {"decision": "applied", "staleness": 0, "loss": 1.0, "samples": None}
        history.take(Event("push", Place(1, self.seq), self.seq, members))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def steps(history: RunHistory) -> list[float]:
    return history.curves.curves["loss"].columns()["step"]


def run_it(work: Callable[[], object]) -> None:
    async def begin() -> None:
        await work()  # type: ignore[misc]

    asyncio.run(asyncio.wait_for(begin(), 60))


def test_it_is_saved_every_30_seconds_in_which_it_changes(scene: Scene) -> None:
    async def work() -> None:
        async with scene.owner() as history:
            scene.push(history)
            assert not history.is_due()
            scene.now += 30
            assert history.is_due()
            await history.save()
            assert not history.is_due()
            scene.now += 60
            assert not history.is_due()
            scene.push(history)
            assert history.is_due()
            await history.save()
            scene.push(history)
        async with scene.owner() as next_one:
            assert steps(next_one) == [1, 2]

    run_it(work)


def test_it_is_saved_behind_each_checkpoint(scene: Scene) -> None:
    async def work() -> None:
        async with scene.owner() as history:
            scene.push(history)
            assert not history.is_due()
            history.take(Event("checkpoint", Place(1, 1, 1), 1))
            assert history.is_due()
            await history.save()
            assert not history.is_due()

    run_it(work)


def test_damage_is_said_once_and_the_run_goes_on(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with scene.owner() as history:
            scene.push(history)
            await history.save()
        text = (scene.root / FILE).read_bytes()
        (scene.root / FILE).write_bytes(text[: len(text) // 2])
        async with scene.owner() as history:
            assert steps(history) == []
            await history.save()
        async with scene.owner() as history:
            scene.push(history)
            assert steps(history) == [2]

    run_it(work)
    assert caplog.text.count("run run: its history is damaged, and begins anew") == 1


def test_what_cannot_be_read_is_read_later_and_not_written_over(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with scene.owner() as history:
            scene.push(history)
            await history.save()
        scene.storage.fails = True
        async with scene.owner() as history:
            scene.push(history)
            with pytest.raises(StorageUnavailable, match="out of order"):
                _ = history.curves
            for _ in range(3):
                assert not history.is_due()
                scene.now += 30
                assert history.is_due()
                await history.save()
            scene.storage.fails = False
            await history.save()
            assert steps(history) == [1]
            scene.push(history)
            assert steps(history) == [1, 3]

    run_it(work)
    assert caplog.text.count("it is not read") == 1


def test_an_opening_does_not_wait_for_storage_that_hangs(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with scene.owner() as history:
            scene.push(history)
            await history.save()
        scene.storage.answers, scene.patience_s = threading.Event(), 0.05
        async with scene.owner() as history:
            with pytest.raises(StorageUnavailable, match=r"has not answered for 0\.05 s"):
                _ = history.curves
            scene.storage.answers.set()
            while history.failure is not None:
                await history.save()
            assert steps(history) == [1]

    run_it(work)
    assert caplog.text.count("it is not read") == 1


def test_what_cannot_be_written_is_written_later(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with scene.owner() as history:
            scene.storage.fails = True
            for _ in range(3):
                scene.push(history)
                await history.save()
            assert steps(history) == [1, 2, 3]
            scene.now += 30
            assert history.is_due()
            scene.storage.fails = False
            await history.save()
        async with scene.owner() as history:
            assert steps(history) == [1, 2, 3]

    run_it(work)
    assert caplog.text.count("it is not written, and is tried again") == 1


def test_nothing_is_written_once_the_shard_is_another_s(scene: Scene) -> None:
    async def work() -> None:
        async with scene.owner() as history:
            scene.push(history)
            history.end()
            scene.push(history)
            scene.now += 30
            assert not history.is_due()
            await history.save()
            assert not (scene.root / FILE).exists()
            with pytest.raises(StorageUnavailable):
                _ = history.curves

    run_it(work)
