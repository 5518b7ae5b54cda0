"""Whole states of runs as bodies: exported, read, changed and imported over plain HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import safetensors.torch
import torch
from torch import Tensor

from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.state.memory_budget import MemoryBudget
from meanwhile import wait_until
from plain_calls import TENSORS, Api

__all__ = ["body_of", "document_of", "export", "free_memory", "gradient", "import_", "points", "tensors_of", "train"]


def export(api: Api) -> bytes:
    """The body of a run's state."""
    answer = api.http.get(api.path("/state"))
    assert answer.status_code == 200, answer.text
    return answer.content


def free_memory(memory: MemoryBudget) -> int:
    """What is free once no buffer is reserved: an answer's is given back after who asked has all of it."""
    wait_until(lambda: memory._amounts == 0)
    return memory.free


def import_(api: Api, body: bytes, *, headers: Mapping[str, str] | None = None, **query: Any) -> httpx.Response:
    return api.http.put(
        api.path("/state"), params=query, content=body, headers={"Content-Type": MEDIA_TYPE, **(headers or {})}
    )


def document_of(body: bytes) -> dict[str, Any]:
    """The JSON document in the metadata of a state's body."""
    length = int.from_bytes(body[:8], "little")
    return dict(json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["freestep.state"]))


def tensors_of(body: bytes) -> dict[str, Tensor]:
    return safetensors.torch.load(body)


def body_of(tensors: Mapping[str, Tensor], document: Any) -> bytes:
    """A state's body from its parts, whose tensors safetensors puts into an order of its own."""
    return safetensors.torch.save(dict(tensors), {"freestep.state": json.dumps(document)})


def changed(body: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A state's body whose document was changed."""
    document = document_of(body)
    change(document)
    return body_of(tensors_of(body), document)


def gradient(step: int, tensors: Mapping[str, Tensor] = TENSORS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def train(api: Api, first: int, last: int, tensors: Mapping[str, Tensor] = TENSORS, worker: str = "worker") -> None:
    """Takes a run from one step to another by gradients that depend on their step alone."""
    lease = api.lease(worker)
    for step in range(first, last):
        answer = api.push(lease, step, tensors=gradient(step, tensors))
        assert (answer.status_code, answer.json().get("step")) == (200, step + 1), answer.text


def points(api: Api, **query: Any) -> list[bytes]:
    """The bytes of x, y and z."""
    return [safetensors.torch.save(api.pull(point, **query)[0]) for point in "xyz"]
