"""A journal that a test writes, places in its files, and the command that looks at it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from freestep_service.domain.records import CheckpointId, Claim
from freestep_service.journal_command import main
from freestep_service.storage.journal import Journal
from freestep_service.storage.journal_files import frames, segment_paths
from freestep_service.storage.journal_format import Frame, Kind
from freestep_service.storage.journal_parts import PartWriter
from meanwhile import DEADLINE_S

__all__ = ["BASE", "LARGE", "Writing", "body", "claim", "frame_places", "journal_command", "last_segment"]

BASE = CheckpointId(1, 10, 100)
LARGE = 3 * 1024**2 + 17


class Writing:
    """A journal, and the thread that waits for it."""

    def __init__(self, directory: Path) -> None:
        self._told: queue.Queue[Callable[[], None]] = queue.Queue()
        self.journal = Journal(directory, "run", "id", self._told.put)
        self.journal.take_over()

    def wait(self, act: Callable[[Callable[[Exception | None], None]], object]) -> None:
        """Has something done, and raises what it failed with."""
        outcomes: list[Exception | None] = []
        act(outcomes.append)
        while not outcomes:
            self._told.get(timeout=DEADLINE_S)()
        if outcomes[0] is not None:
            raise outcomes[0]

    def begin(self, epoch: int = 1, base: CheckpointId | None = BASE, seq: int = 100) -> None:
        self.wait(lambda done: self.journal.begin(epoch, base, seq, done))

    def part(self, key: str, length: int) -> PartWriter:
        """Room for a body, which is to come."""
        self.wait(lambda done: self.journal.make_room(length, done) and done(None))
        return self.journal.part(claim(key), length)

    def push(self, key: str, body: bytes, piece: int = 100_000) -> None:
        """Writes a body as if it came in pieces of so many bytes."""
        part = self.part(key, len(body))
        for begin in range(0, len(body), piece):
            part.write(memoryview(body)[begin : begin + piece])
        self.wait(lambda done: part.written(done) and done(None))
        part.finish(xxhash.xxh3_128_hexdigest(body))

    def push_all(self, seqs: Iterable[int], body: bytes, epoch: int = 1) -> None:
        """Writes a push for each of these entries, and the entry behind it."""
        for seq in seqs:
            self.push(f"key-{seq}", body)
            self.entry(seq, f"key-{seq}", epoch)

    def entry(self, seq: int, key: str | None = None, epoch: int = 1, **more: Any) -> None:
        members = {"epoch": epoch, "seq": seq, **more}
        if key is not None:
            members |= {"key": key, "counts": True}
        self.wait(lambda done: self.journal.entry(members, done))

    def flush(self) -> None:
        self.wait(self.journal.flush)


def claim(key: str) -> Claim:
    """Of a push of step 5."""
    return Claim("lease", 1, 5, key, samples=2.0, loss=0.5)


def body(length: int = 1000, seed: int = 0) -> bytes:
    """Bytes that differ by their seed."""
    return bytes((seed + index) % 251 for index in range(length))


def last_segment(writing: Writing) -> Path:
    """The file that is written to."""
    return segment_paths(writing.journal.directory)[-1][1]


def frame_places(path: Path, kind: Kind) -> list[Frame]:
    """The frames of a kind in a segment, in order."""
    return [frame for frame in frames(path) if isinstance(frame, Frame) and frame.kind == kind]


def journal_command(data_dir: Path, *arguments: str) -> int:
    """Runs `freestep journal`; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--data-dir", str(data_dir)])
    return int(ended.value.code or 0)
