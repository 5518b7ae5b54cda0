"""Shards whose state is checkpointed, whole or in parts, and damage to the files of those."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from forms import FORMS, own
from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.domain.records import CheckpointId, Record
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard, StateCopy
from freestep_service.storage.checkpoints import Checkpoints, id_of
from freestep_service.storage.checksummed import Damaged

__all__ = [
    "RECORD",
    "advance",
    "bounds",
    "files",
    "flip_a_bit",
    "newest",
    "part_of",
    "points",
    "shard",
    "truncate",
    "with_checksum",
    "write",
]

RECORD = Record("claim", {"0": "digest"}, "applied", step=1, staleness=0, seq=1, live=1, worker="w", epoch=1)


def shard(form: str = "adamw_schedule_free", index: int = 0, count: int = 1, **changes: Any) -> Shard:
    """Shard `index` of `count` of a run of 37 elements."""
    document = {
        "optimizer": FORMS[form],
        "parameters": [{"name": "w", "shape": [31]}, {"name": "v", "shape": [2, 3], "group": "other"}],
        "groups": {"other": own(form, lr=0.5, weight_decay=0.2)},
        **changes,
    }
    spec = RunSpec.model_validate(document)
    manifest = Manifest(spec.parameters).part(index, count)
    made = Shard(spec, manifest, torch.device("cpu"))
    made.initialize(torch.randn(37, generator=torch.Generator().manual_seed(0))[manifest.begin : manifest.end], epoch=1)
    return made


def advance(made: Shard, entries: int, batch: int = 1) -> None:
    """Applies entries whose gradients depend on their place alone."""
    for seq in range(made.seq + 1, made.seq + 1 + entries):
        gradient = torch.randn(37, generator=torch.Generator().manual_seed(seq))
        gradient = gradient[made.manifest.begin : made.manifest.end].clone()
        made.apply(Entry(seq, made.epoch, advance=seq % batch == 0, gradient=gradient, worker=f"w{seq}", weight=seq))


def points(*shards: Shard) -> list[torch.Tensor]:
    """x, y and z of the whole run."""
    outs = [torch.empty(37) for _ in "xyz"]
    for point, out in zip("xyz", outs, strict=True):
        for made in shards:
            made.copy_point(point, out[made.manifest.begin : made.manifest.end])  # type: ignore[arg-type]
    return outs


def bounds(count: int) -> list[tuple[int, int]]:
    """Where the parts of `count` shards begin and end."""
    manifests = [shard(index=index, count=count).manifest for index in range(count)]
    return [(manifest.begin, manifest.end) for manifest in manifests]


def part_of(copy: StateCopy, begin: int, end: int) -> StateCopy:
    """The copy that a shard of elements `begin` to `end` makes of the same state."""
    return dataclasses.replace(copy, tensors={name: tensor[begin:end].clone() for name, tensor in copy.tensors.items()})


def write(
    checkpoints: Checkpoints, copy: StateCopy, shards: int = 1, receipts: Mapping[str, Record] | None = None
) -> CheckpointId:
    """Writes all parts of a checkpoint, as that many shards do."""
    for begin, end in bounds(shards):
        checkpoints.write(part_of(copy, begin, end), begin, end, 37, receipts or {})
    checkpoints.complete(id_of(copy))
    return id_of(copy)


def newest(checkpoints: Checkpoints, begin: int = 0, end: int = 37) -> StateCopy | None:
    """The newest checkpoint that passes its checks, found as a shard finds it."""
    while offers := checkpoints.offers(begin, end):
        try:
            return checkpoints.load(offers[-1], begin, end).state
        except Damaged:
            continue
    return None


def files(directory: Path, suffix: str = "") -> list[Path]:
    """The files of the newest checkpoint in a storage's directory."""
    found = sorted(directory.glob("runs/run/checkpoints/*"))[-1]
    return sorted(each for each in found.iterdir() if each.name.endswith(suffix))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def with_checksum(document: dict[str, Any]) -> bytes:
    """A document as it is stored, with its checksum."""
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())
    return json.dumps({**document, "checksum": checksum}).encode()
