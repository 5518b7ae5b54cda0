"""The checkpoints of a run in storage: written in parts by its shards, listed, chosen, loaded and dropped.

Several processes write and drop here at the same time. A checkpoint may have parts of several numbers of shards, and is
loaded from those that cover the elements that are asked for. A damaged part is logged and skipped. A medium that cannot
be read is not damage: it raises StorageUnavailable, since the run would go back to an older checkpoint.

    runs/RUN/checkpoints/EPOCH-STEP-SEQ/         a checkpoint (inventory.py)
    runs/RUN/closed/BEGIN-END.json               the log entry at which an orderly shutdown left a shard
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from freestep.api.models import Checkpoint
from freestep.errors import CheckpointNotFound, StorageUnavailable
from freestep_service.domain.records import CheckpointId, Record
from freestep_service.state.shard import StateCopy
from freestep_service.storage.checksummed import Damaged, NewerFormat, read_document, write_document
from freestep_service.storage.coverage import Chosen, cover
from freestep_service.storage.inventory import Inventory
from freestep_service.storage.medium import Storage
from freestep_service.storage.part_manifest import Part, part_name, read_manifest
from freestep_service.storage.parts import DamagedPart, check_tensors, read_tensors, write_part
from freestep_service.storage.run_files import RunFile

__all__ = ["Checkpoints", "LoadedState", "id_of"]

logger = logging.getLogger("freestep")


class LoadedState(NamedTuple):
    """A stretch of a run's state as it was checkpointed, and the receipts of the pushes in it, by key."""

    state: StateCopy
    receipts: dict[str, Record]


class Checkpoints:
    """The checkpoints of one run, of which the newest `keep` complete ones are kept.

    first_epoch: in which the run was created. Checkpoints of earlier epochs were left when an earlier run of this name
    was deleted: they are not the run's, and dropped with its first.
    Calls block, may come from several threads, and raise StorageUnavailable where the medium fails.
    """

    def __init__(self, storage: Storage, run: str, keep: int, first_epoch: int = 0) -> None:
        self._storage = storage
        self._run = f"runs/{run}"
        self._inventory = Inventory(storage, f"{self._run}/checkpoints", first_epoch)
        self._keep = keep

    def write(self, copy: StateCopy, begin: int, end: int, numel: int, receipts: Mapping[str, Record]) -> int:
        """Writes a part: elements `begin` to `end` of `numel`, which are the copy's, and the receipts of its pushes.

        Returns the bytes of its tensors' file. A part that is there already, and whole, is left as it is.
        """
        checkpoint_id, name = id_of(copy), part_name(begin, end)
        whole = self._find_whole(checkpoint_id, name)
        if whole is not None:
            return whole.manifest.bytes
        path = f"{self._inventory.path(checkpoint_id)}/{name}"
        size = write_part(self._storage, path, copy, begin, end, numel, receipts)
        self._inventory.note_written(checkpoint_id, name)
        return size

    def complete(self, checkpoint_id: CheckpointId) -> None:
        """Records that all parts of a checkpoint are written, then drops those older than the newest `keep` complete.

        What cannot be dropped is logged, and dropped after a later checkpoint.
        """
        self._inventory.mark_complete(checkpoint_id, self._run_file())
        try:
            self._drop_old()
        except StorageUnavailable as error:
            logger.warning("old checkpoints of %s are not dropped yet: %s", self._run, error)

    def _run_file(self) -> dict[str, Any] | None:
        """What the run's file says, to be copied; None where it cannot be read."""
        try:
            return RunFile.read(self._storage, self._run.removeprefix("runs/")).members()
        except (FileNotFoundError, Damaged, StorageUnavailable):
            return None

    def offers(self, begin: int, end: int) -> list[CheckpointId]:
        """The checkpoints that hold elements `begin` to `end` on this medium, oldest first, by their manifests.

        One that cannot be read is logged and left out where a newer one can be; else StorageUnavailable is raised.
        """
        found: list[CheckpointId] = []
        for checkpoint_id in reversed(self._inventory.ids()):
            try:
                parts = self._inventory.contents(checkpoint_id, begin, end).parts
            except StorageUnavailable as error:
                if not found:
                    raise
                logger.error("checkpoint %s of %s is left out: %s", checkpoint_id, self._run, error)
                continue
            if cover(parts, begin, end):
                found.append(checkpoint_id)
        return found[::-1]

    def load(
        self, checkpoint_id: CheckpointId, begin: int, end: int, vectors: Collection[str] | None = None
    ) -> LoadedState:
        """Elements `begin` to `end` of a checkpoint, as flat fp32 tensors on the CPU, each part's file read once.

        vectors: names of those that are wanted, None for all. Raises Damaged where no parts that pass their checks
        cover them; `offers` then leaves the checkpoint out.
        """
        reason = f"elements {begin} to {end} of it are not all there"
        while chosen := cover(self._inventory.contents(checkpoint_id, begin, end).parts, begin, end):
            try:
                return self._assemble(chosen, begin, end, vectors)
            except DamagedPart as error:
                reason = f"{error.part.name}: {error}"
                self._inventory.note_damaged(checkpoint_id, error)
        raise Damaged(reason)

    def all(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest first, by their manifests."""
        found = ((checkpoint_id, self._inventory.contents(checkpoint_id)) for checkpoint_id in self._inventory.ids())
        return [_describe(checkpoint_id, contents.parts) for checkpoint_id, contents in found if contents.is_complete]

    def describe(self, checkpoint_id: CheckpointId) -> Checkpoint:
        """A complete checkpoint, by its manifests. Raises CheckpointNotFound, also where it has been dropped."""
        contents = self._inventory.contents(checkpoint_id)
        if not contents.is_complete:
            raise CheckpointNotFound(f"there is no checkpoint {checkpoint_id}", step=checkpoint_id.step)
        return _describe(checkpoint_id, contents.parts)

    def at(self, step: int) -> CheckpointId:
        """The complete checkpoint of a step, of the newest epoch that has one. Raises CheckpointNotFound."""
        reason = f"there is no checkpoint of step {step}"
        for checkpoint_id in reversed(self._inventory.ids()):
            if checkpoint_id.step == step:
                contents = self._inventory.contents(checkpoint_id)
                if contents.is_complete:
                    return checkpoint_id
                if contents.is_damaged:
                    reason = f"the checkpoint of step {step} is damaged"
        raise CheckpointNotFound(reason, step=step)

    def require_removable(self) -> None:
        """Raises StorageUnavailable where a removal would leave the run's directory."""
        self._storage.require_removable(self._run)

    def newest_epoch(self) -> int:
        """The newest epoch of which there is any file of a checkpoint; 0 where there is none."""
        return max((checkpoint_id.epoch for checkpoint_id in self._inventory.all_ids()), default=0)

    def remove(self, last_epoch: int) -> None:
        """Removes all files of a run that was deleted in an epoch, the run file first: without it there is no run.

        Those of a new run of its name, which has later epochs, stay. May be called again.
        """
        if not self._has_later(last_epoch):
            self._storage.remove(f"{self._run}/run.json")
        for checkpoint_id in self._inventory.all_ids():
            if checkpoint_id.epoch <= last_epoch:
                self._inventory.drop(checkpoint_id)
        if not self._has_later(last_epoch):
            self._storage.remove(self._run)

    def _has_later(self, epoch: int) -> bool:
        """Whether there are files of a later epoch, or of a newer version."""
        try:
            epoch_of_file = RunFile.read_as_is(self._storage, self._run.removeprefix("runs/")).epoch
        except NewerFormat:
            return True
        except (FileNotFoundError, Damaged, StorageUnavailable):
            epoch_of_file = 0
        return max(epoch_of_file, self.newest_epoch()) > epoch

    def mark_closed(self, begin: int, end: int, epoch: int, seq: int) -> None:
        """Records that an orderly shutdown left a shard at a log entry, with a checkpoint of that state."""
        write_document(self._storage, self._closed_path(begin, end), {"epoch": epoch, "seq": seq})

    def closed(self, begin: int, end: int) -> tuple[int, int] | None:
        """(epoch, seq) as `mark_closed` was given them; None where it was not called, or the record is damaged."""
        path = self._closed_path(begin, end)
        reason = "it holds no epoch and seq"
        try:
            match read_document(self._storage, path):
                case {"epoch": int(epoch), "seq": int(seq)}:
                    return epoch, seq
        except FileNotFoundError:
            return None
        except Damaged as error:
            reason = str(error)
        logger.error("%s/%s is damaged and skipped: %s", self._storage, path, reason)
        return None

    def clear_closed(self, begin: int, end: int) -> None:
        """Removes the record of `mark_closed`, if there is one."""
        self._storage.remove(self._closed_path(begin, end))

    def _closed_path(self, begin: int, end: int) -> str:
        return f"{self._run}/closed/{part_name(begin, end)}.json"

    def _drop_old(self) -> None:
        """Keeps the newest complete checkpoint of each of the newest steps that have one."""
        checkpoint_ids = self._inventory.all_ids()
        kept: dict[tuple[int, int], CheckpointId] = {}
        for checkpoint_id in reversed(self._inventory.ids()):
            place = checkpoint_id[:2]
            if place not in kept and len(kept) < self._keep and self._inventory.is_complete(checkpoint_id):
                kept[place] = checkpoint_id
        for checkpoint_id in checkpoint_ids:
            if kept and checkpoint_id < kept.get(checkpoint_id[:2], min(kept.values())):
                try:
                    self._inventory.drop(checkpoint_id)
                except StorageUnavailable as error:
                    logger.warning("checkpoint %s of %s is not dropped yet: %s", checkpoint_id, self._run, error)

    def _find_whole(self, checkpoint_id: CheckpointId, name: str) -> Part | None:
        """The part of this name, if it passes all checks."""
        try:
            part = read_manifest(self._storage, self._inventory.path(checkpoint_id), checkpoint_id, name)
            check_tensors(self._storage, part)
        except (FileNotFoundError, Damaged):
            return None
        return part

    def _assemble(self, chosen: list[Chosen], begin: int, end: int, vectors: Collection[str] | None) -> LoadedState:
        first_part = chosen[0].part
        names = [name for name in first_part.manifest.vectors if vectors is None or name in vectors]
        tensors = {name: torch.empty(end - begin, dtype=torch.float32, device="cpu") for name in names}
        receipts: dict[str, Record] = {}
        for part, first, last in chosen:
            if part.common_state() != first_part.common_state():
                raise DamagedPart(part, "it is not of the same state as the other parts")
            if first < last:
                targets = {name: tensor[first - begin : last - begin] for name, tensor in tensors.items()}
                read_tensors(self._storage, part, first, last, targets)
            receipts |= part.receipts
        return LoadedState(first_part.manifest.state_copy(tensors), receipts)


def id_of(copy: StateCopy) -> CheckpointId:
    """The checkpoint that a copy of the state is of."""
    return CheckpointId(copy.epoch, copy.step, copy.seq)


def _describe(checkpoint_id: CheckpointId, parts: list[Part]) -> Checkpoint:
    manifests = [part.manifest for part in parts]
    return Checkpoint(
        step=checkpoint_id.step,
        epoch=checkpoint_id.epoch,
        created_at=max(manifest.created_at for manifest in manifests),
        bytes=sum(manifest.bytes for manifest in manifests),
    )
