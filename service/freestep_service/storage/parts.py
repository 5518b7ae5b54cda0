"""A part of a checkpoint: elements BEGIN to END of a run's state vectors, and all of the state that is no vector.

    BEGIN-END.safetensors    the state vectors, each flat fp32 [END - BEGIN], one after another
    BEGIN-END.json           the manifest (part_manifest.py)

A part is whole or it is not there: the manifest is written after the tensors and removed before them. Every byte of the
tensors passes through the checksum (XXH3-128), also of elements that are not asked for, and nothing is used before the
checksum was compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import xxhash
from torch import Tensor

from freestep.errors import StorageUnavailable
from freestep.wire.header import encode_header
from freestep_service.domain.records import Record
from freestep_service.state.buffers import memory_of
from freestep_service.state.shard import StateCopy
from freestep_service.storage.checksummed import Damaged, write_document
from freestep_service.storage.medium import Storage
from freestep_service.storage.part_manifest import Part, manifest_members, part_layout

__all__ = ["DamagedPart", "check_tensors", "read_tensors", "write_part"]

_PIECE = 4 * 1024 * 1024
"""Bytes that are read or written at a time."""


class DamagedPart(Damaged):
    """A part's manifest passed its checks, and its tensors do not."""

    def __init__(self, part: Part, reason: str) -> None:
        super().__init__(reason)
        self.part = part


def write_part(
    storage: Storage, path: str, copy: StateCopy, begin: int, end: int, numel: int, receipts: Mapping[str, Record]
) -> int:
    """Writes a copy of elements `begin` to `end` of `numel`; returns the length of its tensors' file in bytes.

    path: of the part's files, without the suffix. Where it raises StorageUnavailable, nothing of the part is left, as
    far as the medium allows.
    """
    header = encode_header(part_layout(copy.tensors, end - begin), "F32")
    size = len(header) + 4 * len(copy.tensors) * (end - begin)
    digest = xxhash.xxh3_128()
    try:
        storage.remove(f"{path}.json")
        storage.write(f"{path}.safetensors", _digested(_pieces(header, copy.tensors.values()), digest))
        members = manifest_members(copy, begin, end, numel, receipts, size, digest.hexdigest())
        write_document(storage, f"{path}.json", members)
    except BaseException:
        # On a full medium the remains would take up room until newer checkpoints replace them.
        with suppress(StorageUnavailable):
            storage.remove(f"{path}.json")
            storage.remove(f"{path}.safetensors")
        raise
    return size


def check_tensors(storage: Storage, part: Part) -> None:
    """Reads a part's tensors for their checksum. Raises DamagedPart, StorageUnavailable."""
    read_tensors(storage, part, part.manifest.begin, part.manifest.begin, {})


def read_tensors(storage: Storage, part: Part, first: int, last: int, targets: Mapping[str, Tensor]) -> None:
    """Reads elements `first` to `last` of the run into `targets`: state vector -> flat fp32 [last - first], on the CPU.

    Vectors without a target are read for the checksum only. Raises DamagedPart, after which the targets' contents are
    not to be used, and StorageUnavailable.
    """
    digest = xxhash.xxh3_128()
    scratch = memoryview(bytearray(_PIECE))
    skipped, length = first - part.manifest.begin, last - first
    try:
        with storage.open(f"{part.path}.safetensors") as file:

            def read(size: int, target: memoryview | None = None) -> None:
                for start in range(0, size, _PIECE):
                    piece = (scratch if target is None else target[start:])[: min(_PIECE, size - start)]
                    if file.readinto(piece) != len(piece):
                        raise DamagedPart(part, "its tensors' file is too short")
                    digest.update(piece)

            if file.read(len(part.header)) != part.header:
                raise DamagedPart(part, "its tensors' file does not begin with the header that its manifest implies")
            digest.update(part.header)
            for slot in part.layout.slots:
                target = targets.get(slot.name)
                if target is None:
                    read(4 * slot.numel)
                else:
                    read(4 * skipped)
                    read(4 * length, memory_of(target))
                    read(4 * (slot.numel - skipped - length))
            is_at_end = not file.read(1)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamagedPart(part, "its tensors' file is missing") from error
    if not is_at_end or digest.hexdigest() != part.manifest.tensors:
        raise DamagedPart(part, "its tensors do not have the checksum that its manifest names")


def _pieces(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        content = memory_of(tensor)
        for start in range(0, len(content), _PIECE):
            yield content[start : start + _PIECE]


def _digested(pieces: Iterable[bytes | memoryview], digest: xxhash.xxh3_128) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        digest.update(piece)
        yield piece
