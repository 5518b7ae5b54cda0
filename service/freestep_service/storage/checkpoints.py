"""The checkpoints of a run in storage: cuts, written in parts by its shards, listed, chosen, loaded and dropped.

    runs/RUN/closed/BEGIN-END.json               where in the log an orderly shutdown left a shard
    runs/RUN/checkpoints/EPOCH-STEP-SEQ/         one cut:
        BEGIN-END.safetensors, BEGIN-END.json        a part: elements BEGIN to END of the run's flat vectors
        complete.json                                all parts are written, here or on the disks of other hosts

The law of this file: a checkpoint is whole or it is not there. A part's manifest is written after its tensors and
dropped before them; what fails a check is skipped and said so. A cut may have parts of several numbers of shards, and
is loaded from whichever cover what is asked for. Several processes write and drop here at the same time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import torch

from freestep.api.models import Checkpoint
from freestep.errors import CheckpointNotFound
from freestep.wire.header import encode_header
from freestep_service.domain.records import CheckpointId, Record
from freestep_service.state.shard import StateCopy
from freestep_service.storage.checksummed import Damaged, verified, with_checksum
from freestep_service.storage.media import Storage
from freestep_service.storage.part_manifest import DamagedPart, Part, layout_of, manifest_of, read_part, stretch_name
from freestep_service.storage.part_tensors import read_tensors, write_tensors

__all__ = ["Checkpoints"]

logger = logging.getLogger("freestep")

_MARK = "complete.json"
_CUT_NAME = re.compile("([0-9]+)-([0-9]+)-([0-9]+)")
_MANIFEST_NAME = re.compile(r"(([0-9]+)-([0-9]+))\.json")


class _Chosen(NamedTuple):
    """A part, and the elements of the run, `first` to `last`, that are taken from it."""

    part: Part
    first: int
    last: int


@dataclass(frozen=True)
class _Contents:
    """What there is of a cut. damaged: some of it is known to fail its checks."""

    parts: list[Part]
    marked: bool
    damaged: bool

    @property
    def complete(self) -> bool:
        if not self.parts:
            return False
        return (self.marked and not self.damaged) or bool(_cover(self.parts, 0, self.parts[0].manifest.numel))


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` complete ones are kept.

    Calls block on the medium, raise OSError when it fails, and may come from several threads.
    """

    def __init__(self, storage: Storage, run: str, keep: int) -> None:
        self._storage = storage
        self._run = f"runs/{run}"
        self._directory = f"{self._run}/checkpoints"
        self._keep = keep
        self._damaged: dict[CheckpointId, set[str]] = {}
        """Parts of which only reading them whole told that they are damaged."""

    def write(self, cut: StateCopy, begin: int, end: int, numel: int, receipts: Mapping[str, Record]) -> int:
        """Writes elements `begin` to `end` of `numel`, which are the cut's, and the receipts of its pushes.

        Returns the bytes of its tensors. Where the part is there already, and whole, it is left as it is.
        """
        identity, name = CheckpointId(cut.epoch, cut.step, cut.seq), stretch_name(begin, end)
        path = f"{self._path(identity)}/{name}"
        there = self._find_whole(identity, name)
        if there is not None:
            return there.manifest.bytes
        layout = layout_of(cut.tensors, end - begin)
        header = encode_header(layout, "F32")
        size = len(header) + 4 * layout.numel
        manifest = manifest_of(cut, begin, end, numel, receipts, size, _now())
        try:
            self._storage.remove(f"{path}.json")
            checksum = write_tensors(self._storage, path, header, cut.tensors.values())
            self._storage.write(f"{path}.json", [with_checksum(manifest | {"tensors": checksum})])
        except OSError:
            # Half a part would lie there, on a medium that may be full, until newer checkpoints push it out.
            with suppress(OSError):
                self._storage.remove(f"{path}.json")
                self._storage.remove(f"{path}.safetensors")
            raise
        self._damaged.get(identity, set()).discard(name)
        return size

    def offers(self, begin: int, end: int) -> list[CheckpointId]:
        """The cuts of which elements `begin` to `end` are here, oldest first, by what the parts' manifests say."""
        return [cut for cut in self._cuts() if _cover(self._look(cut, begin, end).parts, begin, end)]

    def load(self, cut: CheckpointId, begin: int, end: int) -> tuple[StateCopy, dict[str, Record]]:
        """Elements `begin` to `end` of a cut, and the receipts of the pushes in it.

        Raises Damaged when no parts that pass their checks cover them; `offers` then leaves the cut out.
        """
        reason = f"elements {begin} to {end} of it are not all there"
        while chosen := _cover(self._look(cut, begin, end).parts, begin, end):
            try:
                return self._assemble(cut, chosen, begin, end)
            except DamagedPart as error:
                reason = f"{error.part.name}: {error}"
                logger.error("checkpoint part %s is damaged and skipped: %s", self._place(error.part.path), error)
                self._damaged.setdefault(cut, set()).add(error.part.name)
        raise Damaged(reason)

    def all(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest first, by what the parts' manifests say."""
        found = ((cut, self._look(cut)) for cut in self._cuts())
        return [_describe(cut, contents.parts) for cut, contents in found if contents.complete]

    def at(self, step: int) -> CheckpointId:
        """The complete checkpoint of a step, of the newest epoch that has one. Raises CheckpointNotFound."""
        reason = f"there is no checkpoint of step {step}"
        for cut in reversed(self._cuts()):
            if cut.step == step:
                contents = self._look(cut)
                if contents.complete:
                    return cut
                if contents.damaged:
                    reason = f"the checkpoint of step {step} is damaged"
        raise CheckpointNotFound(reason, step=step)

    def complete(self, cut: CheckpointId) -> None:
        """Takes note that all parts of a cut are written, then drops what is older than the newest complete ones."""
        self._storage.write(f"{self._path(cut)}/{_MARK}", [with_checksum({"completed_at": _now()})])
        oldest, kept = cut, 0
        cuts = self._cuts()
        for each in reversed(cuts):
            if self._is_complete(each):
                oldest, kept = each, kept + 1
            if kept == self._keep:
                break
        for each in cuts:
            if each < oldest:
                try:
                    self._drop(each)
                except OSError as error:
                    logger.warning("checkpoint %s is not dropped yet: %s", self._place(self._path(each)), error)

    def mark_closed(self, begin: int, end: int, epoch: int, seq: int) -> None:
        """Takes note of the log entry at which a shard was left in good order, with a checkpoint of it."""
        self._storage.write(self._closed_path(begin, end), [with_checksum({"epoch": epoch, "seq": seq})])

    def closed(self, begin: int, end: int) -> tuple[int, int] | None:
        """(epoch, seq) as `mark_closed` was given them; None if it was not, or what it wrote is damaged."""
        path = self._closed_path(begin, end)
        try:
            document = verified(self._storage.read(path))
        except FileNotFoundError:
            return None
        except (OSError, Damaged) as error:
            logger.error("%s is damaged and skipped: %s", self._place(path), error)
            return None
        match document:
            case {"epoch": int(epoch), "seq": int(seq)}:
                return epoch, seq
        logger.error("%s is damaged and skipped: it holds no epoch and seq", self._place(path))
        return None

    def clear_closed(self, begin: int, end: int) -> None:
        self._storage.remove(self._closed_path(begin, end))

    def remove(self) -> None:
        """Removes everything of the run, the run file first: without it there is no run."""
        self._storage.remove(f"{self._run}/run.json")
        for cut in self._cuts():
            self._drop(cut)
        self._storage.remove(self._run)

    def _path(self, cut: CheckpointId) -> str:
        return f"{self._directory}/{_cut_name(cut)}"

    def _closed_path(self, begin: int, end: int) -> str:
        return f"{self._run}/closed/{stretch_name(begin, end)}.json"

    def _place(self, path: str) -> str:
        return f"{self._storage}/{path}"

    def _cuts(self) -> list[CheckpointId]:
        """The cuts of which there is anything, oldest first."""
        matches = map(_CUT_NAME.fullmatch, self._storage.names(self._directory))
        cuts = ((match.string, CheckpointId(*map(int, match.groups()))) for match in matches if match)
        return sorted(cut for name, cut in cuts if name == _cut_name(cut))

    def _look(self, cut: CheckpointId, begin: int = 0, end: int = 0) -> _Contents:
        """What there is of a cut, of parts only those that overlap `begin` to `end`, or all where these are equal."""
        names = self._storage.names(self._path(cut))
        parts: list[Part] = []
        damaged = False
        for match in filter(None, map(_MANIFEST_NAME.fullmatch, names)):
            name, first, last = match[1], int(match[2]), int(match[3])
            if begin < end and not (first < end and begin < last):
                continue
            if name in self._damaged.get(cut, ()):
                damaged = True
                continue
            try:
                parts.append(read_part(self._storage, self._path(cut), cut, name))
            except FileNotFoundError:
                # Somebody drops the cut.
                continue
            except Damaged as error:
                place = self._place(f"{self._path(cut)}/{name}")
                logger.error("checkpoint part %s is damaged and skipped: %s", place, error)
                damaged = True
        return _Contents(parts, _MARK in names, damaged)

    def _is_complete(self, cut: CheckpointId) -> bool:
        """Whether it is to be counted among those kept. What is marked is not read, lest every checkpoint reads all."""
        marked = _MARK in self._storage.names(self._path(cut)) and not self._damaged.get(cut)
        return marked or self._look(cut).complete

    def _drop(self, cut: CheckpointId) -> None:
        """Removes a cut such that nothing of it looks whole on the way."""
        path = self._path(cut)
        manifests = [name for name in self._storage.names(path) if name.endswith(".json")]
        for name in sorted(manifests, key=lambda name: name != _MARK):
            self._storage.remove(f"{path}/{name}")
        self._storage.remove(path)
        self._damaged.pop(cut, None)

    def _find_whole(self, cut: CheckpointId, name: str) -> Part | None:
        """A part that passes all checks, for which its tensors are read."""
        try:
            part = read_part(self._storage, self._path(cut), cut, name)
            read_tensors(self._storage, part, 0, 0, {})
        except (OSError, Damaged):
            return None
        return part

    def _assemble(
        self, cut: CheckpointId, chosen: list[_Chosen], begin: int, end: int
    ) -> tuple[StateCopy, dict[str, Record]]:
        leader = chosen[0].part
        tensors = {name: torch.empty(end - begin) for name in leader.manifest.vectors}
        receipts: dict[str, Record] = {}
        for part, first, last in chosen:
            if part.common() != leader.common():
                raise DamagedPart(part, "it is not of the same state as the other parts")
            if first < last:
                stretches = {name: tensor[first - begin : last - begin] for name, tensor in tensors.items()}
                read_tensors(self._storage, part, first, last, stretches)
            receipts |= part.receipts
        return leader.manifest.state_copy(tensors), receipts


def _cover(parts: Iterable[Part], begin: int, end: int) -> list[_Chosen]:
    """Parts that cover elements `begin` to `end` among them, as few as can be; none if they do not.

    Any part covers nothing at all.
    """
    rest = list(parts)
    if begin == end:
        return [_Chosen(part, begin, begin) for part in rest[:1]]
    chosen: list[_Chosen] = []
    reached = begin
    while reached < end:
        reaching = [part for part in rest if part.manifest.begin <= reached < part.manifest.end]
        if not reaching:
            return []
        # Of those that reach as far, the shortest: all of it is read.
        best = max(reaching, key=lambda part: (min(part.manifest.end, end), part.manifest.begin))
        chosen.append(_Chosen(best, reached, min(best.manifest.end, end)))
        reached = best.manifest.end
    return chosen


def _describe(cut: CheckpointId, parts: list[Part]) -> Checkpoint:
    manifests = [part.manifest for part in parts]
    return Checkpoint(
        step=cut.step,
        epoch=cut.epoch,
        created_at=max(manifest.created_at for manifest in manifests),
        bytes=sum(manifest.bytes for manifest in manifests),
    )


def _cut_name(cut: CheckpointId) -> str:
    return f"{cut.epoch:08d}-{cut.step:012d}-{cut.seq:012d}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
