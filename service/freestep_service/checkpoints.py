"""Checkpoints in storage: a run's cuts, written in parts by its shards, and what else outlives the service.

    deleted/RUN                                  the last epoch of a run that was deleted
    runs/RUN/run.json                            spec, epoch and number of shards
    runs/RUN/closed/BEGIN-END.json               where in the log an orderly shutdown left a shard
    runs/RUN/checkpoints/EPOCH-STEP-SEQ/         one cut:
        BEGIN-END.safetensors, BEGIN-END.json        a part: elements BEGIN to END of the run's flat vectors
        complete.json                                all parts are written, here or on the disks of other hosts

The law of this file: a checkpoint is whole or it is not there. A part's manifest is written after its tensors and
dropped before them; it names the checksum of the tensors and of itself; what fails a check is skipped and said so.
Checksums are XXH3-128, against damage and not against forgery. A cut may have parts of several numbers of shards,
and is loaded from whichever cover what is asked for. Several processes write and drop here at the same time.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from freestep.errors import CheckpointNotFound
from freestep.header import encode_header
from freestep.manifest import Manifest
from freestep.models import Checkpoint, ParameterSpec
from freestep_service.records import CutId, Record
from freestep_service.shard import Cut
from freestep_service.storage import Storage

__all__ = ["Checkpoints", "Damaged", "LastEpochs", "RunFile"]

logger = logging.getLogger("freestep")

_FORMAT = 2
_PIECE = 4 * 1024 * 1024
"""Bytes that pass through memory at a time."""

_MARK = "complete.json"
_CUT_NAME = re.compile("([0-9]+)-([0-9]+)-([0-9]+)")
_MANIFEST_NAME = re.compile(r"(([0-9]+)-([0-9]+))\.json")


class Damaged(Exception):
    """What is in storage fails its checks; the message says how."""


@dataclass(frozen=True)
class RunFile:
    """What storage knows of a run beside its checkpoints; `spec` is canonical JSON."""

    spec: str
    epoch: int
    shards: int

    def write(self, storage: Storage, run: str) -> None:
        storage.write(f"runs/{run}/run.json", [json.dumps(asdict(self)).encode()])

    @classmethod
    def read(cls, storage: Storage, run: str) -> RunFile:
        """Raises OSError or ValueError when there is none that can be read."""
        return _RUN_FILE.validate_json(storage.read(f"runs/{run}/run.json"), strict=True)


_RUN_FILE = TypeAdapter(RunFile)


class LastEpochs:
    """The last epoch of each run that was deleted: a run of the same name goes on after it.

    Else a lease, a step or an ETag of the run that is gone would pass for one of the new run's.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read(self, run: str) -> int:
        """0 for a run that never was. Raises OSError or ValueError when it cannot be read."""
        try:
            return int(self._storage.read(f"deleted/{run}"))
        except FileNotFoundError:
            return 0

    def write(self, run: str, epoch: int) -> None:
        self._storage.write(f"deleted/{run}", [str(epoch).encode()])


class _PartManifest(BaseModel):
    """What a part's json holds beside its format and checksum; older versions wrote none of what has a default."""

    model_config = ConfigDict(strict=True, frozen=True)

    epoch: int
    step: int
    seq: int
    begin: int
    end: int
    numel: int
    """Elements of the whole run."""
    vectors: list[str]
    """The names of the tensors, in the order of the file; each is flat fp32 [end - begin]."""
    tensors: str
    """The checksum of the whole file of the tensors."""
    created_at: str
    bytes: int
    scalars: dict[str, dict[str, int | float]]
    group: dict[str, int]
    weight: float
    damping: float
    lateness: int = 0
    loss: float = 0.0
    expected_staleness: float = 0.0
    metrics: dict[str, dict[str, float]] = {}
    """Name -> step -> value, of what evaluators have reported."""
    receipts: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Part:
    """A part whose manifest passed its checks. path: without a suffix; header: what its file begins with."""

    name: str
    path: str
    manifest: _PartManifest
    layout: Manifest
    header: bytes
    receipts: dict[str, Record]

    def common(self) -> str:
        """What all parts of a cut have in common, as text, by which NaN is equal to itself."""
        own = {"begin", "end", "tensors", "created_at", "bytes", "receipts"}
        return json.dumps(self.manifest.model_dump(exclude=own), sort_keys=True)


class _DamagedPart(Damaged):
    def __init__(self, part: _Part, reason: str) -> None:
        super().__init__(reason)
        self.part = part


class _Chosen(NamedTuple):
    """A part, and the elements of the run, `first` to `last`, that are taken from it."""

    part: _Part
    first: int
    last: int


@dataclass(frozen=True)
class _Contents:
    """What there is of a cut. damaged: some of it is known to fail its checks."""

    parts: list[_Part]
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
        self._damaged: dict[CutId, set[str]] = {}
        """Parts of which only reading them whole told that they are damaged."""

    def write(self, cut: Cut, begin: int, end: int, numel: int, receipts: Mapping[str, Record]) -> int:
        """Writes elements `begin` to `end` of `numel`, which are the cut's, and the receipts of its pushes.

        Returns the bytes of its tensors. Where the part is there already, and whole, it is left as it is.
        """
        identity, name = CutId(cut.epoch, cut.step, cut.seq), _stretch(begin, end)
        path = f"{self._path(identity)}/{name}"
        there = self._find_whole(identity, name)
        if there is not None:
            return there.manifest.bytes
        vectors = list(cut.tensors)
        layout = _layout(vectors, end - begin)
        header = encode_header(layout, "F32")
        size = len(header) + 4 * layout.numel
        digest = xxhash.xxh3_128()
        manifest = {
            "epoch": cut.epoch,
            "step": cut.step,
            "seq": cut.seq,
            "begin": begin,
            "end": end,
            "numel": numel,
            "vectors": vectors,
            "created_at": _now(),
            "bytes": size,
            "scalars": {group: dict(scalars) for group, scalars in cut.scalars.items()},
            "group": cut.group,
            "weight": cut.weight,
            "damping": cut.damping,
            "lateness": cut.lateness,
            "loss": cut.loss,
            "metrics": {
                name: {str(step): value for step, value in steps.items()} for name, steps in cut.reported.items()
            },
            "expected_staleness": cut.expected_staleness,
            "receipts": {key: asdict(record) for key, record in receipts.items()},
        }
        try:
            self._storage.remove(f"{path}.json")
            self._storage.write(f"{path}.safetensors", _digested(_pieces(header, cut.tensors.values()), digest))
            self._storage.write(f"{path}.json", [_seal(manifest | {"tensors": digest.hexdigest()})])
        except OSError:
            # Half a part would lie there, on a medium that may be full, until newer checkpoints push it out.
            with suppress(OSError):
                self._storage.remove(f"{path}.json")
                self._storage.remove(f"{path}.safetensors")
            raise
        self._damaged.get(identity, set()).discard(name)
        return size

    def offers(self, begin: int, end: int) -> list[CutId]:
        """The cuts of which elements `begin` to `end` are here, oldest first, by what the parts' manifests say."""
        return [cut for cut in self._cuts() if _cover(self._look(cut, begin, end).parts, begin, end)]

    def load(self, cut: CutId, begin: int, end: int) -> tuple[Cut, dict[str, Record]]:
        """Elements `begin` to `end` of a cut, and the receipts of the pushes in it.

        Raises Damaged when no parts that pass their checks cover them; `offers` then leaves the cut out.
        """
        reason = f"elements {begin} to {end} of it are not all there"
        while chosen := _cover(self._look(cut, begin, end).parts, begin, end):
            try:
                return self._assemble(cut, chosen, begin, end)
            except _DamagedPart as error:
                reason = f"{error.part.name}: {error}"
                logger.error("checkpoint part %s is damaged and skipped: %s", self._place(error.part.path), error)
                self._damaged.setdefault(cut, set()).add(error.part.name)
        raise Damaged(reason)

    def all(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest first, by what the parts' manifests say."""
        found = ((cut, self._look(cut)) for cut in self._cuts())
        return [_describe(cut, contents.parts) for cut, contents in found if contents.complete]

    def at(self, step: int) -> CutId:
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

    def complete(self, cut: CutId) -> None:
        """Takes note that all parts of a cut are written, then drops what is older than the newest complete ones."""
        self._storage.write(f"{self._path(cut)}/{_MARK}", [_seal({"completed_at": _now()})])
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
        self._storage.write(self._closed_path(begin, end), [_seal({"epoch": epoch, "seq": seq})])

    def closed(self, begin: int, end: int) -> tuple[int, int] | None:
        """(epoch, seq) as `mark_closed` was given them; None if it was not, or what it wrote is damaged."""
        path = self._closed_path(begin, end)
        try:
            document = _unseal(self._storage.read(path))
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

    def _path(self, cut: CutId) -> str:
        return f"{self._directory}/{_cut_name(cut)}"

    def _closed_path(self, begin: int, end: int) -> str:
        return f"{self._run}/closed/{_stretch(begin, end)}.json"

    def _place(self, path: str) -> str:
        return f"{self._storage}/{path}"

    def _cuts(self) -> list[CutId]:
        """The cuts of which there is anything, oldest first."""
        matches = map(_CUT_NAME.fullmatch, self._storage.names(self._directory))
        cuts = ((match.string, CutId(*map(int, match.groups()))) for match in matches if match)
        return sorted(cut for name, cut in cuts if name == _cut_name(cut))

    def _look(self, cut: CutId, begin: int = 0, end: int = 0) -> _Contents:
        """What there is of a cut, of parts only those that overlap `begin` to `end`, or all where these are equal."""
        names = self._storage.names(self._path(cut))
        parts: list[_Part] = []
        damaged = False
        for match in filter(None, map(_MANIFEST_NAME.fullmatch, names)):
            name, first, last = match[1], int(match[2]), int(match[3])
            if begin < end and not (first < end and begin < last):
                continue
            if name in self._damaged.get(cut, ()):
                damaged = True
                continue
            try:
                parts.append(self._read_part(cut, name))
            except FileNotFoundError:
                # Somebody drops the cut.
                continue
            except Damaged as error:
                place = self._place(f"{self._path(cut)}/{name}")
                logger.error("checkpoint part %s is damaged and skipped: %s", place, error)
                damaged = True
        return _Contents(parts, _MARK in names, damaged)

    def _is_complete(self, cut: CutId) -> bool:
        """Whether it is to be counted among those kept. What is marked is not read, lest every checkpoint reads all."""
        marked = _MARK in self._storage.names(self._path(cut)) and not self._damaged.get(cut)
        return marked or self._look(cut).complete

    def _drop(self, cut: CutId) -> None:
        """Removes a cut such that nothing of it looks whole on the way."""
        path = self._path(cut)
        manifests = [name for name in self._storage.names(path) if name.endswith(".json")]
        for name in sorted(manifests, key=lambda name: name != _MARK):
            self._storage.remove(f"{path}/{name}")
        self._storage.remove(path)
        self._damaged.pop(cut, None)

    def _read_part(self, cut: CutId, name: str) -> _Part:
        """Raises FileNotFoundError when it is not there, Damaged when its manifest fails its checks."""
        path = f"{self._path(cut)}/{name}"
        try:
            document = _unseal(self._storage.read(f"{path}.json"))
            manifest = _PartManifest.model_validate(document)
            layout = _layout(manifest.vectors, manifest.end - manifest.begin)
            receipts = {key: Record(**record) for key, record in manifest.receipts.items()}
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Damaged(f"its manifest cannot be read ({error})") from error
        except (ValidationError, TypeError) as error:
            raise Damaged("its manifest does not hold what one holds") from error
        header = encode_header(layout, "F32")
        named = (CutId(manifest.epoch, manifest.step, manifest.seq), _stretch(manifest.begin, manifest.end))
        if named != (cut, name) or manifest.end > manifest.numel:
            raise Damaged("its manifest is that of another part")
        if manifest.bytes != len(header) + 4 * layout.numel or len(layout.by_name) != len(layout.slots):
            raise Damaged("its manifest contradicts itself")
        return _Part(name, path, manifest, layout, header, receipts)

    def _find_whole(self, cut: CutId, name: str) -> _Part | None:
        """A part that passes all checks, for which its tensors are read."""
        try:
            part = self._read_part(cut, name)
            self._read_tensors(part, 0, 0, {})
        except (OSError, Damaged):
            return None
        return part

    def _assemble(self, cut: CutId, chosen: list[_Chosen], begin: int, end: int) -> tuple[Cut, dict[str, Record]]:
        leader = chosen[0].part
        state = leader.manifest
        tensors = {name: torch.empty(end - begin) for name in state.vectors}
        receipts: dict[str, Record] = {}
        for part, first, last in chosen:
            if part.common() != leader.common():
                raise _DamagedPart(part, "it is not of the same state as the other parts")
            if first < last:
                stretches = {name: tensor[first - begin : last - begin] for name, tensor in tensors.items()}
                self._read_tensors(part, first, last, stretches)
            receipts |= part.receipts
        made = Cut(
            **cut._asdict(),
            tensors=tensors,
            scalars=dict(state.scalars),
            group=dict(state.group),
            weight=state.weight,
            damping=state.damping,
            lateness=state.lateness,
            loss=state.loss,
            reported={
                name: {int(step): value for step, value in steps.items()} for name, steps in state.metrics.items()
            },
            expected_staleness=state.expected_staleness,
        )
        return made, receipts

    def _read_tensors(self, part: _Part, first: int, last: int, targets: Mapping[str, Tensor]) -> None:
        """Reads a part's tensors once through, and of each elements `first` to `last` of the run into its target.

        Raises _DamagedPart when they do not have the checksum that the manifest names.
        """
        digest = xxhash.xxh3_128()
        scratch = memoryview(bytearray(_PIECE))
        skipped, length = first - part.manifest.begin, last - first
        try:
            with self._storage.open(f"{part.path}.safetensors") as file:

                def pass_on(size: int, target: memoryview | None = None) -> None:
                    for start in range(0, size, _PIECE):
                        piece = (scratch if target is None else target[start:])[: min(_PIECE, size - start)]
                        if file.readinto(piece) != len(piece):
                            raise _DamagedPart(part, "its tensors are cut short")
                        digest.update(piece)

                if file.read(len(part.header)) != part.header:
                    raise _DamagedPart(part, "its tensors do not begin with the header that belongs to its manifest")
                digest.update(part.header)
                for slot in part.layout.slots:
                    target = targets.get(slot.name)
                    if target is None:
                        pass_on(4 * slot.numel)
                    else:
                        pass_on(4 * skipped)
                        pass_on(4 * length, _bytes_of(target))
                        pass_on(4 * (slot.numel - skipped - length))
                is_at_end = not file.read(1)
        except OSError as error:
            raise _DamagedPart(part, f"its tensors cannot be read: {error}") from error
        if not is_at_end or digest.hexdigest() != part.manifest.tensors:
            raise _DamagedPart(part, "its tensors do not have the checksum that its manifest names")


def _cover(parts: Iterable[_Part], begin: int, end: int) -> list[_Chosen]:
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


def _describe(cut: CutId, parts: list[_Part]) -> Checkpoint:
    manifests = [part.manifest for part in parts]
    return Checkpoint(
        step=cut.step,
        epoch=cut.epoch,
        created_at=max(manifest.created_at for manifest in manifests),
        bytes=sum(manifest.bytes for manifest in manifests),
    )


def _cut_name(cut: CutId) -> str:
    return f"{cut.epoch:08d}-{cut.step:012d}-{cut.seq:012d}"


def _stretch(begin: int, end: int) -> str:
    return f"{begin:015d}-{end:015d}"


def _layout(vectors: Iterable[str], length: int) -> Manifest:
    """Where the vectors lie in a part's file, one after another. Raises ValidationError."""
    return Manifest(ParameterSpec(name=name, shape=(length,)) for name in vectors)


def _pieces(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        content = _bytes_of(tensor)
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]


def _digested(pieces: Iterable[bytes | memoryview], digest: xxhash.xxh3_128) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a flat fp32 tensor on the CPU."""
    assert tensor.dtype == torch.float32 and tensor.is_contiguous(), "state vectors are flat fp32"
    # An empty array's memory cannot be cast.
    return tensor.numpy().data.cast("B") if tensor.numel() else memoryview(b"")


def _seal(document: Mapping[str, Any]) -> bytes:
    """A document as JSON that names its format and its own checksum."""
    content = {"format": _FORMAT, **document}
    return json.dumps(content | {"checksum": _checksum(content)}, indent=1).encode()


def _unseal(text: bytes) -> dict[str, Any]:
    """The document that was sealed. Raises Damaged."""
    try:
        content = json.loads(text)
        checksum = content.pop("checksum")
        expected = _checksum(content)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise Damaged(f"its manifest cannot be read ({type(error).__name__})") from error
    if checksum != expected:
        raise Damaged("its manifest does not have the checksum that it names")
    if content.pop("format", None) != _FORMAT:
        raise Damaged("its format is not the one that this version reads")
    return dict(content)


def _checksum(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
