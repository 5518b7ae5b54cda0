"""Runs that cannot be opened: none is made anew, none holds up others, and each is opened once it can be."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from freestep.errors import ShardUnavailable, StorageUnavailable
from freestep_service.coordination.nodes import NODES_KEY
from freestep_service.coordination.run_scripts import RUNS_KEY
from freestep_service.domain.tokens import ANYBODY
from freestep_service.runs.registry import Registry
from freestep_service.storage import checksummed
from freestep_service.storage.checksummed import parse_document, write_document
from freestep_service.storage.media import LocalStorage
from in_process import Medium, claim_of, lease_of, new_run, process, pull, push, run_async, spec_of, until


@pytest.fixture
def left(store: str, tmp_path: Path) -> Path:
    """What a service has left of a run of one push, in storage alone."""

    async def work() -> None:
        async with process(store, tmp_path / "data") as registry:
            await push(run := await new_run(registry), claim_of(await lease_of(run), "one"))

    run_async(work)
    with Redis.from_url(store) as client:
        client.flushall()
    return tmp_path / "data"


async def is_open_at_step_1(registry: Registry) -> bool:
    await lease_of(await registry.find("run"))
    return await pull(registry.get("run").shard(0)) == (1, 1.0)


def test_a_run_that_cannot_be_read_is_not_made_anew(store: str, left: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = left / "runs" / "run" / "run.json"
    before = path.read_bytes()

    async def work() -> None:
        medium = Medium(left)
        medium.fails = "runs/run/run.json"
        async with process(store, left, storage=medium, owner_ttl_seconds=1.0) as registry:
            assert "Input/output error" in registry.problems["run"]
            with pytest.raises(ShardUnavailable, match="Input/output error"):
                await registry.create("run", spec_of(), ANYBODY)
            assert path.read_bytes() == before
            # Each try reads the marks, and then the run's file once.
            mark = str(min(left.glob("runs/run/checkpoints/*/complete.json")).relative_to(left))
            assert 0 < medium.reads.count("runs/run/run.json") <= medium.reads.count(mark)
            medium.fails = None
            await until(lambda: not registry.problems, "the run")
            assert await is_open_at_step_1(registry)

    run_async(work)
    assert caplog.text.count("Input/output error") == 1


@pytest.mark.parametrize("place", ["run.json", "checkpoints", "/complete.json", "closed"])
def test_no_run_is_made_over_files_that_cannot_be_read(store: str, left: Path, tmp_path: Path, place: str) -> None:
    # As of a run that a newer version has made since this service has started.
    shutil.move(left / "runs" / "run", tmp_path / "made")
    at = left / "runs" / "late"

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(at.rglob("*")) if path.is_file()}

    async def work() -> None:
        medium = Medium(left)
        async with process(store, left, storage=medium) as registry:
            shutil.move(tmp_path / "made", at)
            before = contents()
            medium.fails = place
            with pytest.raises(StorageUnavailable, match="Input/output error"):
                await registry.create("late", spec_of(), ANYBODY)
            assert contents() == before
            with Redis.from_url(store, decode_responses=True) as client:
                assert client.smembers(RUNS_KEY) == set()

    run_async(work)


def test_a_run_some_of_whose_files_cannot_be_read_is_deleted(
    store: str, left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        medium = Medium(left)
        async with process(store, left, storage=medium) as registry:
            assert await is_open_at_step_1(registry)
            medium.fails = "/complete.json"
            await registry.delete("run")
            assert registry.all() == []

    run_async(work)
    assert not (left / "runs" / "run").exists()
    assert "run run: what is deleted of it cannot all be read: " in caplog.text


def test_a_run_that_hangs_while_it_is_tried_again_holds_up_no_heartbeat_and_no_request(store: str, left: Path) -> None:
    async def work() -> None:
        medium = Medium(left)
        medium.fails = "runs/run/run.json"
        async with process(store, left, storage=medium, owner_ttl_seconds=1.0) as registry:
            with Redis.from_url(store, decode_responses=True) as client:
                try:
                    medium.reads.clear()
                    medium.hangs = "runs/run/run.json"
                    await until(lambda: medium.hangs in medium.reads, "the next try")
                    medium.fails = None
                    medium.reads.clear()
                    seen = set[float]()

                    def goes_on() -> bool:
                        seen.update(end for _, end in client.zrange(NODES_KEY, 0, -1, withscores=True))
                        return len(seen) > 3

                    await until(goes_on, "the heartbeats")
                    for ask in (registry.find, lambda name: registry.create(name, spec_of(), ANYBODY)):
                        with pytest.raises(ShardUnavailable, match="Input/output error"):
                            await asyncio.wait_for(ask("run"), 20)
                    assert medium.reads == []
                finally:
                    medium.may_go_on.set()
            await until(lambda: not registry.problems, "the run")
            assert await is_open_at_step_1(registry)

    run_async(work)


def test_beside_another_service_a_newer_run_holds_up_no_other(
    store: str, left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = left / "runs" / "run" / "run.json"
    document = parse_document(original := path.read_bytes(), str(path))
    with monkeypatch.context() as patch:
        patch.setattr(checksummed, "_FORMAT", 3)
        write_document(LocalStorage(path.parent), path.name, document)

    async def lost(message: Any) -> None:
        """A message that did not come."""

    async def work() -> None:
        other_node = {"node_url": "http://127.0.0.1:2", "owner_ttl_seconds": 1.0}
        async with (
            process(store, left, owner_ttl_seconds=1.0) as registry,
            process(store, tmp_path / "other", **other_node) as other,
        ):
            monkeypatch.setattr(other._resources.channels, "publish", lost)
            await new_run(other, "zzz")
            await until(lambda: "zzz" in {run.name for run in registry.all()}, "the other's run")
            with pytest.raises(ShardUnavailable, match="is of format 3"):
                await registry.find("run")
            path.write_bytes(original)
            await until(lambda: "run" not in registry.problems, "the run")
            assert await is_open_at_step_1(registry)

    run_async(work)
    assert caplog.text.count("is of format 3") == 1
    assert [record for record in caplog.records if record.exc_info] == []
