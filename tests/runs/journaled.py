"""Journaled runs in the tests' own process: what they hold, images of their disk, and damage of it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from freestep.api.models import Lease
from freestep_service.runs.registry import Registry
from freestep_service.runs.run import Run
from freestep_service.state.shard import StateCopy
from freestep_service.storage.journal_files import segment_paths
from freestep_service.storage.journal_format import Frame, Kind
from harness import store as own_store
from in_process import claim_of, lease_of, new_run, process, push
from storage.journals import frame_places

__all__ = [
    "DAMAGE",
    "break_frame",
    "crashed",
    "is_same",
    "journal_dirs",
    "journaled_run",
    "last_entry",
    "opened",
    "states",
]


async def journaled_run(registry: Registry, pushes: int, shards: int = 1) -> tuple[Run, Lease]:
    """A run of durability `journal` after pushes of one worker; and its lease."""
    run = await new_run(registry, shards=shards, durability="journal")
    lease = await run.leases.grant("worker", None)
    for step in range(pushes):
        await push(run, claim_of(lease, f"key-{step}", step), -1.0 - step)
    return run, lease


def journal_dirs(data_dir: Path) -> list[Path]:
    """The directories of a run's journals, by shard."""
    (run,) = (data_dir / "journal").iterdir()
    return sorted(run.iterdir())


def last_entry(directory: Path) -> tuple[Path, Frame]:
    """The newest entry of a journal, and the segment that it is in."""
    found = [(path, frame) for _, path in segment_paths(directory) for frame in frame_places(path, Kind.ENTRY)]
    return found[-1]


DAMAGE = {"an entry": Kind.ENTRY, "the head of a body": Kind.PART, "the values of a body": Kind.PART}


def break_frame(directory: Path, damage: str, number: int) -> None:
    """Flips a bit of an entry, or of the body of a push, in the newest segment."""
    path, _ = last_entry(directory)
    frame = frame_places(path, DAMAGE[damage])[number]
    # The head of a body follows eight bytes with its length.
    place = {"an entry": frame.at + 45, "the head of a body": frame.body + 8, "the values of a body": frame.end - 1}
    broken = bytearray(path.read_bytes())
    broken[place[damage]] ^= 1
    path.write_bytes(broken)


async def states(run: Run) -> list[StateCopy]:
    """Copies of its shards' states."""
    shards = [run.shard(index) for index in range(run.count)]
    return [await shard.core.writer.run(shard.core.shard.copy_state) for shard in shards]


def is_same(one: StateCopy, other: StateCopy) -> bool:
    """Whether two states are the same to the bit."""
    plain = (
        "epoch",
        "step",
        "seq",
        "scalars",
        "group",
        "weight",
        "damping",
        "reported",
        "loss",
        "norm_history",
        "data",
    )
    return all(getattr(one, name) == getattr(other, name) for name in plain) and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )


async def opened(registry: Registry) -> tuple[Run, Lease]:
    """The run, once it is open, and a lease of it."""
    run = await registry.find("run")
    return run, await lease_of(run, "opener")


@asynccontextmanager
async def crashed(tmp_path: Path, data_dir: Path, **settings: Any) -> AsyncIterator[Registry]:
    """A process on an image of another's directory, with a Redis that knows nothing."""
    image = _image_of(data_dir, tmp_path)
    (image / "redis").mkdir()
    with own_store("valkey", image / "redis") as url:
        async with process(url, image, **settings) as registry:
            yield registry


def _image_of(data_dir: Path, tmp_path: Path) -> Path:
    """A copy of a directory that a process may be writing in, of a moment in which no file came or went."""
    while True:
        image = tmp_path / f"image-{random.randrange(10**9)}"
        names = _names(data_dir)
        # A file that is deleted meanwhile cannot be copied.
        with suppress(shutil.Error):
            shutil.copytree(data_dir, image)
            if _names(data_dir) == names:
                return image


def _names(folder: Path) -> set[str]:
    return {os.path.join(place, name) for place, _, files in os.walk(folder) for name in files}
