"""A shard's journal, for a run whose durability is `journal`: what is acknowledged is on disk.

The law of this file: it waits for the disk on behalf of others, and decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from freestep.errors import ShardUnavailable, StorageUnavailable
from freestep.wire.receiver import Sink, lay
from freestep_service.domain.records import CheckpointId, Claim, Fenced, LogPosition
from freestep_service.runs.resources import Disk
from freestep_service.state.log import Entry
from freestep_service.storage.journal import Journal
from freestep_service.storage.journal_parts import PartWriter
from freestep_service.storage.journal_reader import JournalContents, JournaledPart, read_journal
from freestep_service.storage.journal_rewrite import write_again
from freestep_service.storage.journal_thread import Done, unavailable

__all__ = ["JournaledBody", "ShardJournal"]


class ShardJournal:
    """The journal of one shard, in a directory of its own, on one event loop.

    run_id: tells the run from others of its name.
    """

    def __init__(self, directory: Path, run: str, run_id: str, disk: Disk) -> None:
        self._run_id = run_id
        self._disk = disk
        self._loop = asyncio.get_running_loop()
        self._journal = Journal(directory, run, run_id, self._post)
        self._based = asyncio.Event()

    def _post(self, tell: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(tell)

    # Its beginning

    async def read(self) -> JournalContents:
        """What is on disk, once whoever wrote it before cannot acknowledge any more.

        Raises Damaged and StorageUnavailable.
        """
        with suppress(StorageUnavailable, ShardUnavailable):
            await self.flush()
        try:
            contents = await self._disk.run(self._read)
        except OSError as error:
            raise unavailable(self._journal.directory, error) from error
        self._journal.adopt(contents)
        if contents.run_id != self._run_id:
            # Of a run of this name that was deleted.
            return JournalContents()
        return contents

    def _read(self) -> JournalContents:
        self._journal.take_over()
        contents = read_journal(self._journal.directory)
        write_again(contents)
        return contents

    async def entries(self, after: int) -> list[dict[str, Any]]:
        """The entries of this epoch behind one, as they are on disk. Raises Damaged, OSError."""
        contents = await self._disk.run(read_journal, self._journal.directory)
        return [entry.members for entry in contents.after(after)] if contents.epoch == self._journal.epoch else []

    def go_on(self) -> None:
        """Goes on behind what was read."""
        self._journal.go_on()
        self._based.set()

    async def begin(self, epoch: int, base: CheckpointId | None, seq: int) -> None:
        """Begins an epoch in which entries follow `seq`; returns when that is on disk. Raises StorageUnavailable.

        base: the checkpoint that holds the state of then, None where none does yet.
        """
        if not self._journal.is_owned:
            try:
                await self._disk.run(self._journal.take_over)
            except OSError as error:
                raise unavailable(self._journal.directory, error) from error
        self._based.clear()
        await self._tell(lambda done: self._journal.begin(epoch, base, seq, done))
        if base is not None:
            self._based.set()

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self._journal.directory

    async def is_present_owner(self) -> bool:
        """Whether nobody has taken it over since it was read or begun. Raises OSError."""
        return await self._disk.run(self._journal.is_present_owner)

    @property
    def word(self) -> str:
        """Under which it is written; empty before it is read or begun."""
        return self._journal.word

    @property
    def has_failed(self) -> bool:
        """Whether nothing gets to the disk any more, until it is read anew or an epoch begins."""
        return self._journal.has_failed

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Has a function called whenever it fails."""
        self._journal.watch(on_failure)

    def time_flushes(self, on_flush: Callable[[float], None]) -> None:
        """Has a function called with the seconds that each flush took."""
        self._journal.time_flushes(on_flush)

    @property
    def epoch(self) -> int:
        """Whose entries are written; 0 before the first."""
        return self._journal.epoch

    def back_to(self, seq: int) -> None:
        """The shard goes on after an entry of this epoch: pushes that are not decided, and entries behind it, are
        void."""
        self._journal.back_to(seq)

    # Pushes and entries

    async def part(self, claim: Claim, length: int, seconds: float) -> PartWriter:
        """Begins with a push. Raises StorageUnavailable where the disk is full, or there is no checkpoint to go on from
        within `seconds`."""
        if not self._based.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._based.wait()
            except TimeoutError:
                raise StorageUnavailable("the run has no checkpoint yet that its journal could go on from") from None
        done: asyncio.Future[None] = self._loop.create_future()
        if not self._journal.make_room(length, _setter(done)):
            try:
                await asyncio.shield(done)
            except asyncio.CancelledError:
                # The room may be there, or still come.
                done.add_done_callback(partial(self._give_back, length))
                raise
        return self._journal.part(claim, length)

    def _give_back(self, length: int, made: asyncio.Future[None]) -> None:
        if made.exception() is None:
            self._journal.give_back(length)

    def find(self, key: str) -> JournaledPart | None:
        """The part of a push that is not decided, if all of it has come."""
        return self._journal.find(key)

    def forget(self, key: str) -> None:
        """A push was refused, or dropped."""
        self._journal.forget(key)

    def give_up(self, key: str, place: LogPosition) -> None:
        """Redis does not know a push, when its log stands at a place."""
        self._journal.give_up(key, place)

    def record(self, entry: Entry, done: Done) -> None:
        """Writes an entry of the log, and tells when it is on disk."""
        assert entry.members is not None
        members = {name: value for name, value in entry.members.items() if name not in ("kind", "cuts")}
        if entry.distances is not None:
            members["distances"] = entry.distances.tolist()
        members["counts"] = entry.gradient is not None
        self._journal.entry(members, done)

    async def flush(self) -> None:
        """Returns when what was written is on disk, and was told of. Raises StorageUnavailable, ShardUnavailable."""
        if self._journal.is_owned and self._journal.epoch:
            await self._tell(self._journal.flush)

    async def _tell(self, act: Callable[[Done], None]) -> None:
        done: asyncio.Future[None] = self._loop.create_future()
        act(_setter(done))
        try:
            await done
        except Fenced:
            raise ShardUnavailable("another process has taken over the shard's journal") from None

    # Checkpoints

    def mark(self) -> None:
        """The state is copied for a checkpoint: what is written from now on is not in it."""
        self._journal.next_segment()

    def cut(self, checkpoint: CheckpointId) -> None:
        """Drops what nobody needs beside a checkpoint that all shards have written."""
        self._journal.cut(checkpoint)
        if checkpoint.epoch == self._journal.epoch:
            self._based.set()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._journal.size

    @property
    def since_checkpoint(self) -> int:
        """Bytes on disk that the next checkpoint is to drop."""
        return self._journal.since_checkpoint

    @property
    def lag(self) -> int:
        """Bytes that are not known to be on disk yet."""
        return self._journal.lag

    async def close(self) -> None:
        """Ends its thread once it has done what it was given."""
        await self._disk.run(self._journal.close)


class JournaledBody:
    """The body of a push, as the journal has it."""

    def __init__(self, part: JournaledPart, disk: Disk) -> None:
        self.length = part.length
        self._part = part
        self._disk = disk

    async def receive_into(self, receiver: Sink) -> str:
        """Fills the receiver and returns the digest of the bytes. Raises Damaged, OSError and MalformedTensors."""
        await self._disk.run(self._lay, receiver)
        return self._part.digest

    def _lay(self, receiver: Sink) -> None:
        for piece in self._part.read():
            lay(receiver, piece)

    async def receive_digest(self) -> str:
        """The digest of the bytes."""
        return self._part.digest


def _setter(done: asyncio.Future[None]) -> Done:
    def tell(error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    return tell
