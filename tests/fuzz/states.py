"""Whatever is put as a run's state is refused, or loads and is exported as it came."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from freestep.api.models import RunSpec
from freestep.api.run_state import StateDocument
from freestep.errors import InvalidSpec, MalformedTensors, Overloaded
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import lay
from freestep.wire.state import encode_state_header
from freestep_service.state.compute import HOST
from freestep_service.state.memory_budget import MemoryBudget
from freestep_service.state.received_state import ReceivedState, document_of
from freestep_service.state.shard import Shard, StateCopy
from fuzz.bodies import WORDS, framed, pieces, seed
from fuzz.target import Target, mutants
from malformed.bodies import PARAMETERS

__all__ = ["TARGET"]

_MEMORY = 1024**2


def _received(body: bytes, size: int) -> tuple[StateDocument, StateCopy] | None:
    """The document and the vectors of a state; None if it is refused."""
    received = ReceivedState(MemoryBudget(_MEMORY), lambda document: None)
    try:
        receiver = received.receiver(len(body))
        for piece in pieces(body, size):
            lay(receiver, piece)
        received.require_values()
    except (InvalidSpec, MalformedTensors, Overloaded) as refusal:
        json.dumps(refusal.to_document(422), ensure_ascii=False, allow_nan=False).encode()
        return None
    assert receiver.complete
    return received.document, received.copy()


def _exported(document: StateDocument, vectors: dict[str, Tensor]) -> bytes:
    header = encode_state_header(Manifest.of(document.spec), document)
    return header + b"".join(vectors[name].numpy().tobytes() for name in document.buffers)


def check(data: bytes) -> None:
    body, size = framed(data)
    found = _received(body, size)
    if found is None:
        return
    document, copy = found
    spec = document.spec
    shard = Shard(spec, Manifest.of(spec), HOST)
    shard.load(copy, epoch=1)
    exported = shard.copy_state()
    said = document_of(spec, exported)
    again = _received(_exported(said, exported.tensors), len(body))
    assert again is not None
    assert again[0] == said == document.model_copy(update={"epoch": 1, "buffers": said.buffers})
    assert all(torch.equal(again[1].tensors[name], copy.tensors[name]) for name in document.buffers)


def _seeds() -> list[bytes]:
    found = []
    for optimizer in (
        {"algorithm": "sgd_schedule_free", "lr": 0.1},
        {"algorithm": "adamw_schedule_free"},
        {"algorithm": "adamw", "schedule": {"name": "plateau", "metric": "loss"}},
    ):
        spec = RunSpec.model_validate({"optimizer": optimizer, "parameters": PARAMETERS})
        shard = Shard(spec, Manifest.of(spec), HOST)
        shard.initialize(torch.ones(shard.manifest.numel), epoch=1)
        copy = shard.copy_state()
        body = _exported(document_of(spec, copy), copy.tensors)
        found.append(seed(body, 4 * shard.manifest.numel * len(copy.tensors)))
    return found


_SEEDS = _seeds()
_WORDS = (
    *WORDS, b"freestep.state", b"::y", b"::z", b"::exp_avg_sq", b"spec", b"optimizer", b"algorithm", b"scalars", b"k",
    b"weight_sum", b"beta", b"lr_max", b"metrics", b"loss", b'\\"', b"1e308", b"-1", b"adamw_schedule_free", b"muon",
)  # fmt: skip

TARGET = Target(check, _SEEDS, _WORDS, mutants(_SEEDS, _WORDS))
