"""The files of a shard's journal, and who may write them.

    JOURNAL_DIR/RUN/BEGIN-END/NUMBER-OWNER.journal     a segment (journal_format.py), which names the one before it
    JOURNAL_DIR/RUN/BEGIN-END/owner                    the words of the processes that wrote here, the newest first, and
                                                       a checksum of them
    JOURNAL_DIR/RUN/BEGIN-END/repaired                 where a repair has given up entries: their newest epoch

A process that does not know yet that it was taken over may write on, in segments that no segment of the newest owner
names: nobody was answered for what is in them.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from freestep_service.domain.records import Fenced
from freestep_service.domain.run_names import is_run_name
from freestep_service.storage.checksummed import Damaged, NewerFormat
from freestep_service.storage.durable import flush
from freestep_service.storage.journal_format import FORMAT, Frame, Tail, UnknownKind, format_of, scan
from freestep_service.storage.segment_bytes import SegmentBytes

__all__ = [
    "DamagedJournal",
    "Link",
    "Ownership",
    "chain",
    "elements",
    "fingerprint",
    "frames",
    "is_journal",
    "is_journal_here",
    "is_segment",
    "newest_epoch",
    "note_repair",
    "owner_path",
    "owners",
    "remove_journals",
    "remove_other_journals",
    "repaired_epoch",
    "require_known",
    "runs_with_journals",
    "segment_path",
    "segment_paths",
]

logger = logging.getLogger("freestep")

_SUFFIX = ".journal"
_NAME = r"([0-9]{10,})-[0-9a-f]{16}\.journal"
_OWNER = "owner"
"""The file with the owners' words."""
_REMEMBERED = 1000
"""Owners whose words are kept though they have left nothing."""
_REPAIRED = "repaired"


class DamagedJournal(Damaged):
    """What was on disk is lost, from byte `at` of the segment `path` on."""

    def __init__(self, path: Path, at: int, problem: str) -> None:
        super().__init__(
            f"the journal is damaged: {problem}; on this host, `freestep journal repair {path.parent.parent.name}` "
            "keeps the entries before the damage and gives up those behind it"
        )
        self.path = path
        self.at = at


class Ownership:
    """The right to write a journal, from its taking until another process takes it. Raises OSError, as all calls here.

    word: in the names of the owner's segments.
    """

    def __init__(self, directory: Path) -> None:
        """Fences off whoever wrote there before. To be taken before the journal is read.

        Raises DamagedJournal too, and NewerFormat before anything is changed.
        """
        require_known(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.word = secrets.token_hex(8)
        kept = {path.stem.partition("-")[2] for _, path in segment_paths(directory)}
        # One whose disk was full has no segment, and may be whom Redis knows as the last.
        before = [word for place, word in enumerate(owners(directory)) if word in kept or place < _REMEMBERED]
        words = [self.word, *before]
        temporary = directory / f".{_OWNER}.{self.word}"
        self._path = directory / _OWNER
        try:
            temporary.write_text("\n".join([*words, _checksum(words), ""]))
            flush(temporary)
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        flush(directory)
        self._file = self._present()

    def require(self) -> None:
        """What was made durable before another took over, that one reads. Raises Fenced where it may be too late."""
        if self._present() != self._file:
            raise Fenced

    def _present(self) -> tuple[int, int]:
        found = os.stat(self._path)
        return found.st_ino, found.st_mtime_ns


def require_known(directory: Path) -> None:
    """Raises NewerFormat where a segment of a newer version is in a directory, and OSError."""
    for _, path in segment_paths(directory):
        with suppress(Damaged):
            next(frames(path))


def is_segment(path: Path) -> bool:
    """Whether a path has the name of a segment."""
    return re.fullmatch(_NAME, path.name) is not None


def segment_paths(directory: Path) -> list[tuple[int, Path]]:
    """All segments in a directory by number, oldest first; none where there is no directory.

    Files with other names are no segments.
    """
    if not directory.is_dir():
        return []
    found = [(re.fullmatch(_NAME, path.name), path) for path in directory.iterdir()]
    return sorted((int(name[1]), path) for name, path in found if name is not None)


def fingerprint(directory: Path) -> tuple[tuple[str, int, int, int], ...]:
    """By which it is told whether any file has changed: names, sizes, times and inodes. Raises OSError."""
    found = [(path.name, path.lstat()) for path in sorted(directory.iterdir())] if directory.is_dir() else []
    return tuple((name, stats.st_size, stats.st_mtime_ns, stats.st_ino) for name, stats in found)


def note_repair(directory: Path, epoch: int) -> None:
    """Notes that entries were given up, of this epoch or of earlier ones. Raises OSError."""
    with suppress(DamagedJournal):
        epoch = max(epoch, repaired_epoch(directory))
    temporary = directory / f".{_REPAIRED}"
    temporary.write_text(f"{epoch}\n")
    flush(temporary)
    temporary.replace(directory / _REPAIRED)
    flush(directory)


def repaired_epoch(directory: Path) -> int:
    """The newest epoch of which a repair has given up entries; 0 where none has. Raises DamagedJournal, OSError."""
    path = directory / _REPAIRED
    try:
        return int(path.read_text(errors="replace"))
    except FileNotFoundError:
        return 0
    except ValueError:
        raise DamagedJournal(path, 0, f"{path}, which says what a repair has given up, is damaged") from None


def segment_path(directory: Path, number: int, owner: str) -> Path:
    """Where a segment is."""
    return directory / f"{number:010d}-{owner}{_SUFFIX}"


def owners(directory: Path) -> list[str]:
    """The words of those who wrote in a directory, the newest first. Raises DamagedJournal, OSError.

    In a copy without the file of the words, whoever wrote the newest number is the newest.
    """
    path = owner_path(directory)
    try:
        *words, checksum = path.read_text(errors="replace").split() or [""]
    except FileNotFoundError:
        return list(dict.fromkeys(path.stem.partition("-")[2] for _, path in reversed(segment_paths(directory))))
    if checksum != _checksum(words):
        raise DamagedJournal(path, 0, f"{path}, which says whose segments count, is damaged")
    return words


def owner_path(directory: Path) -> Path:
    """Where the words of those are who wrote in a directory."""
    return directory / _OWNER


def _checksum(words: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest(" ".join(words).encode())


class Link(NamedTuple):
    """A segment that counts. limit: where it ends for the one behind it, None where there is none, or it says nothing.

    What is behind that, a process has written which did not know yet that it was taken over.
    """

    number: int
    path: Path
    limit: int | None = None


def chain(directory: Path) -> list[Link]:
    """The segments that count, oldest first: the newest one of the newest owner that has any, and those before it.

    Raises DamagedJournal, NewerFormat, OSError.
    """
    found = segment_paths(directory)
    numbers = {path.name: number for number, path in found}
    newest = [path for word in owners(directory) for _, path in reversed(found) if path.stem.endswith(word)]
    chained: list[Link] = []
    # One that was only just made may not have its first frame yet.
    path, limit = next((path for path in newest if _previous(path) is not None), None), None
    while path is not None:
        chained.append(Link(numbers[path.name], path, limit))
        # Older versions did not say where it ends.
        name, _, limit = [*(_previous(path) or [None, 0]), None][:3]
        path = directory / name if name in numbers else None
    return chained[::-1]


def is_journal_here(directory: Path, word: str | None, epoch: int) -> bool:
    """Whether a directory has a shard's newest journal, or what a repair has left of it.

    word: of who has written it last; None where nobody knows. Then it is one that has come to the epoch. A damaged one
    is here, too, and so is one of a newer version. Raises OSError.
    """
    try:
        if repaired_epoch(directory) >= max(epoch, 1):
            return True
        present = newest_epoch(directory)
        return present > 0 and word in owners(directory) if word is not None else present >= max(epoch, 1)
    except (Damaged, NewerFormat):
        return True


def newest_epoch(directory: Path) -> int:
    """The epoch of the newest segment that counts; 0 where there is none. Raises as `chain`."""
    chained = chain(directory)
    first = next(frames(chained[-1].path)) if chained else Tail(0)
    return 0 if isinstance(first, Tail) else int(first.head["epoch"])


def _previous(path: Path) -> list[Any] | None:
    """The segment before one, by name, how much of it was on disk, and where it ended: empty for the first one.

    None if it is unknown.
    """
    first = next(frames(path))
    if isinstance(first, Tail):
        if first.is_damaged:
            raise DamagedJournal(path, 0, f"{path} is damaged at byte 0")
        return None
    return first.head.get("previous") or []


def frames(path: Path) -> Iterator[Frame | Tail]:
    """What `scan` finds in a segment.

    Raises NewerFormat, OSError, and DamagedJournal where it is no file, names no format that this version reads, or the
    disk does not give its bytes.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise DamagedJournal(path, 0, f"{path} is no file of its own")
    at = 0
    with SegmentBytes(path) as content:
        try:
            form = format_of(content)
            if form is not None and form > FORMAT:
                raise NewerFormat.of(path, form, FORMAT)
            for found in scan(content):
                if isinstance(found, Frame) and form != FORMAT:
                    raise DamagedJournal(path, 0, f"{path} names no format that this version reads")
                yield found
                at = found.end
        except UnknownKind as error:
            raise NewerFormat(path, f"has {error}") from None
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedJournal(path, at, f"{path} cannot be read from byte {at} on") from error


def elements(directory: Path) -> tuple[int, ...]:
    """The elements of the shard whose journal a directory of this name has, as BEGIN and END; none of another name."""
    words = directory.name.split("-")
    return tuple(map(int, words)) if len(words) == 2 and all(map(_is_decimal, words)) else ()


def is_journal(path: Path) -> bool:
    """Whether a path is a directory of its own for a shard's journal, by its name."""
    return bool(elements(path)) and path.is_dir() and not path.is_symlink()


def runs_with_journals(directory: Path) -> list[str]:
    """The runs of which there is a journal in a directory; none where that cannot be read."""
    with suppress(OSError):
        return [path.name for path in directory.iterdir() if is_run_name(path.name) and any(_shards(path))]
    return []


def _is_decimal(word: str) -> bool:
    return word.isascii() and word.isdecimal()


def _shards(directory: Path) -> Iterator[Path]:
    """The journals of a run's shards. What others have put beside them, a copy say, is theirs."""
    return filter(is_journal, directory.glob("*"))


def remove_journals(directory: Path, last_epoch: int, *, damaged: bool) -> None:
    """Removes the journals of a run that was deleted in an epoch; what cannot be removed is logged.

    Those of a new run of its name, which has later epochs, stay, and so do those of a newer version. damaged: whether
    those are removed whose epoch cannot be read.
    """
    for journal in _shards(directory):
        try:
            is_later = newest_epoch(journal) > last_epoch
        except (Damaged, NewerFormat, OSError) as error:
            if not (damaged and isinstance(error, Damaged)):
                logger.warning("%s is not removed, though its run is deleted: %s", journal, error)
                continue
            is_later = False
        if not is_later:
            _remove(journal)
    with suppress(OSError):
        directory.rmdir()


def remove_other_journals(directory: Path, kept: Collection[str], epoch: int) -> None:
    """Removes the journals of a run that had another number of shards before an epoch; `kept` are those of now.

    What cannot be read or removed is logged.
    """
    for journal in _shards(directory):
        if journal.name in kept:
            continue
        try:
            is_older = newest_epoch(journal) < epoch
        except (Damaged, NewerFormat, OSError) as error:
            logger.warning("%s is not removed, though the run has other shards now: %s", journal, error)
            continue
        if is_older:
            _remove(journal)


def _remove(directory: Path) -> None:
    try:
        for path in sorted(directory.iterdir()):
            path.unlink(missing_ok=True)
        directory.rmdir()
    except OSError as error:
        logger.warning("%s is not removed: %s", directory, error.strerror or error)
