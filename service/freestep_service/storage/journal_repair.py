"""A shard's journal looked through and repaired, while no service reads it or beside one that waits for it.

The law of this file: nothing is removed. What is given up is set aside, under a name that nobody reads.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from freestep_service.domain.records import Record
from freestep_service.domain.run_names import is_run_name
from freestep_service.storage.checksummed import Damaged, NewerFormat
from freestep_service.storage.durable import flush
from freestep_service.storage.journal_files import (
    DamagedJournal,
    Ownership,
    chain,
    elements,
    frames,
    is_journal,
    is_segment,
    note_repair,
    segment_paths,
)
from freestep_service.storage.journal_format import Frame, Kind
from freestep_service.storage.journal_reader import JournalContents, read_journal
from freestep_service.storage.segment_bytes import SegmentBytes

__all__ = ["Examination", "Repair", "discard", "examine", "journal_directories", "look", "repair", "rows"]

T = TypeVar("T")

_ASIDE = ".damaged"
_BLOCK = 2**20
_MOST_LOOKS = 10
"""At a journal of which each shows another fault."""


@dataclass(frozen=True)
class Examination:
    """A shard's journal, read wholly.

    contents: None where there is damage. damage: what is lost, from where on, or that a newer version has written it.
    bytes: of its segments. unsound: undecided parts whose bodies are not whole, which nobody was answered for.
    allocated: bytes behind its last frame that are zeros, as room that was allocated ahead is: they are no torn tail.
    """

    directory: Path
    bytes: int
    contents: JournalContents | None = None
    unsound: int = 0
    allocated: int = 0
    damage: Damaged | NewerFormat | None = None


@dataclass
class Repair:
    """What a repair has kept and given up: numbers of entries, pushes by worker, and the files that were set aside.

    first, last: of the entries that are kept, 0 where there are none.
    """

    directory: Path
    first: int = 0
    last: int = 0
    lost: list[int] = field(default_factory=list)
    pushes: Counter[str] = field(default_factory=Counter)
    aside: list[Path] = field(default_factory=list)

    @property
    def has_cut(self) -> bool:
        """Whether entries may have been given up."""
        return any(is_segment(path.with_suffix("")) for path in self.aside)


def journal_directories(journals: Path, run: str | None = None) -> list[Path]:
    """The directories of shards' journals, of one run or all, in the order of their elements.

    Raises OSError where a directory is not there or cannot be read: it must not pass for empty.
    """
    runs = sorted(
        path
        for path in journals.iterdir()
        # Others are the file system's, as `lost+found`.
        if (path.name == run if run is not None else is_run_name(path.name)) and path.is_dir()
    )
    found = [path for each in runs for path in each.iterdir() if is_journal(path)]
    return sorted(found, key=lambda path: (path.parent.name, elements(path)))


def examine(directory: Path) -> Examination:
    """Reads a journal and all bodies in it. Raises OSError."""
    return look(lambda: _examine(directory), lambda found: found.damage)


def look(read: Callable[[], T], fault: Callable[[T], Exception | None]) -> T:
    """What is read of a journal that a service may be writing, and cutting behind its checkpoints, meanwhile.

    It may look damaged, or lack a segment, in another place each time. So a fault counts that is there twice.
    fault: of what was read. Raises as `read` does.
    """
    before: str | None = None
    for looks in range(1, _MOST_LOOKS + 1):
        raised: OSError | None = None
        try:
            found = read()
            error = fault(found)
        except OSError as failure:
            error = raised = failure
        if error is None or str(error) == before or looks == _MOST_LOOKS:
            break
        before = str(error)
    if raised is not None:
        raise raised
    return found


def _examine(directory: Path) -> Examination:
    size = sum(path.lstat().st_size for _, path in segment_paths(directory))
    try:
        contents = read_journal(directory)
        _read_bodies(contents)
    except (Damaged, NewerFormat) as error:
        return Examination(directory, size, damage=error)
    unsound = 0
    for part in contents.parts.values():
        try:
            part.check()
        except Damaged:
            unsound += 1
    return Examination(directory, size, contents, unsound, _allocated(contents))


def _allocated(contents: JournalContents) -> int:
    if not contents.segments:
        return 0
    last, count = contents.segments[-1], 0
    with last.path.open("rb") as file:
        file.seek(last.size)
        while block := file.read(_BLOCK):
            if block.count(0) < len(block):
                return 0
            count += len(block)
    return count if count == contents.torn else 0


def _read_bodies(contents: JournalContents) -> None:
    """Raises DamagedJournal, whose place is that of the entry, where a body is not what was written."""
    for entry in contents.entries:
        if entry.part is not None:
            try:
                entry.part.check()
            except DamagedJournal as error:
                error.path, error.at = entry.segment.path, entry.at
                raise


def repair(directory: Path) -> Repair | None:
    """Keeps the entries before the damage; None where there is none. Raises NewerFormat and OSError.

    Whoever writes the journal is fenced off first, and it is noted that the run has to go on in a new epoch. A later
    segment is set aside before an earlier one is cut, so that a repair that breaks off leaves a journal to repair.
    """
    damage = examine(directory).damage
    if damage is None:
        return None
    if not isinstance(damage, DamagedJournal):
        raise damage
    done = Repair(directory)
    _take_over(done)
    while (damage := examine(directory).damage) is not None:
        if not isinstance(damage, DamagedJournal):
            raise damage
        if is_segment(damage.path):
            _cut(done, damage.path, damage.at)
        else:
            _set_aside(done, damage.path)
            note_repair(directory, max(_epochs(directory), default=0))
    entries = read_journal(directory).entries
    if entries:
        done.first, done.last = entries[0].seq, entries[-1].seq
    done.lost = sorted(set(done.lost) - {entry.seq for entry in entries})
    return done


def discard(directory: Path) -> Repair | None:
    """Sets all segments aside, so that the shard goes back to its checkpoint; None where there are none.

    Raises NewerFormat and OSError.
    """
    paths = segment_paths(directory)
    if not paths:
        return None
    done = Repair(directory)
    _take_over(done)
    _cut(done, paths[0][1], 0)
    return done


def _take_over(done: Repair) -> None:
    """Fences off whoever writes the journal. Where nobody can tell who that was, the newest number counts."""
    try:
        Ownership(done.directory)
    except DamagedJournal as damage:
        _set_aside(done, damage.path)
        Ownership(done.directory)


def _set_aside(done: Repair, path: Path) -> None:
    done.aside.append(path.rename(_free_name(path)))
    flush(done.directory)


def _cut(done: Repair, damaged: Path, at: int) -> None:
    """Sets aside what is behind a place, the newest segment first."""
    note_repair(done.directory, max(_epochs(done.directory), default=0))
    for _, path in reversed(segment_paths(done.directory)):
        if path.name < damaged.name:
            break
        is_kept = path == damaged and at > 0
        _note_lost(done, path, at if is_kept else 0)
        aside = _free_name(path)
        if is_kept:
            _keep_front(path, at, aside)
            done.aside.append(aside)
            flush(done.directory)
        else:
            _set_aside(done, path)


def _epochs(directory: Path) -> Iterator[int]:
    """The epochs of which anything can be read in the segments."""
    for _, path in segment_paths(directory):
        with suppress(Damaged):
            for frame in frames(path):
                if isinstance(frame, Frame) and "epoch" in frame.head:
                    yield int(frame.head["epoch"])


def _keep_front(path: Path, length: int, aside: Path) -> None:
    """Sets a segment aside, and puts its first bytes in its place at once; the others are not read."""
    front = path.with_name(f".{path.name}")
    with SegmentBytes(path) as content, front.open("wb") as file:
        file.writelines(content.pieces(0, length))
    shutil.copymode(path, front)
    flush(front)
    try:
        aside.hardlink_to(path)
    except OSError:
        # Such a file system has no links.
        shutil.copyfile(path, aside)
        flush(aside)
    front.replace(path)


def _note_lost(done: Repair, path: Path, at: int) -> None:
    """Counts the entries from a place on that can still be read."""
    try:
        for frame in frames(path):
            if isinstance(frame, Frame) and frame.kind == Kind.ENTRY and frame.at >= at:
                done.lost.append(frame.head["seq"])
                if "record" in frame.head:
                    done.pushes[Record.from_json(frame.head["record"]).worker] += 1
    except Damaged:
        return


def _free_name(path: Path) -> Path:
    names = [path.with_name(f"{path.name}{_ASIDE}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000)))]
    return next(name for name in names if not os.path.lexists(name))


def rows(directory: Path) -> Iterator[dict[str, Any]]:
    """A document for each frame, in order, for people and programs, up to damage.

    Raises Damaged, NewerFormat and OSError.
    """
    for link in chain(directory):
        for frame in frames(link.path):
            if link.limit is not None and frame.end > link.limit:
                break
            if isinstance(frame, Frame):
                yield _row(link.number, frame)
            elif frame.is_damaged:
                raise DamagedJournal(link.path, frame.end, f"{link.path} is damaged at byte {frame.end}")
    # What no single frame shows: entries or segments that are missing.
    read_journal(directory)


def _row(segment: int, frame: Frame) -> dict[str, Any]:
    head = frame.head
    claim = head.get("claim", {})
    row: dict[str, Any] = {
        "segment": segment,
        "byte": frame.at,
        "kind": frame.kind.name.lower(),
        "epoch": head.get("epoch"),
        "seq": head.get("seq"),
        "step": claim.get("step"),
        "lease": claim.get("lease"),
        "worker": None,
        "decision": None,
        "staleness": None,
        "key": head.get("key", claim.get("key")),
        "body_bytes": frame.end - frame.body,
    }
    if "record" in head:
        record = Record.from_json(head["record"])
        row |= {
            "step": record.step,
            "lease": record.claim.split(" ", 1)[0],
            "worker": record.worker,
            "decision": record.decision,
            "staleness": record.staleness,
        }
    return row
