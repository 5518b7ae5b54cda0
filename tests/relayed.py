"""A service of several processes without a network: runs whose shards are elsewhere, and owners that answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx

from freestep.api.models import RunSpec
from freestep.errors import ShardUnavailable
from freestep.wire.manifest import Manifest
from freestep_service.web.relay import Relay

OWNERS = ("http://one:8000", "https://two/behind/a/proxy")
"""The URLs of the shards' owners."""
MANIFEST = Manifest.of(
    RunSpec.model_validate(
        {"optimizer": {"algorithm": "sgd"}, "parameters": [{"name": "w", "shape": [4]}, {"name": "b", "shape": [3]}]}
    )
)

Owner = Callable[[httpx.Request], Awaitable[httpx.Response]]


class Secret:
    """Signs in the open."""

    def sign(self, message: bytes) -> str:
        return f"signed {message.decode()}"

    async def verify(self, message: bytes, signature: str) -> bool:
        return signature == self.sign(message)


@dataclass
class ShardedRun:
    """A run whose shards are elsewhere."""

    owners: list[str | None] = field(default_factory=lambda: list(OWNERS))
    name: str = "run"
    manifest: Manifest = MANIFEST
    heartbeats: int = 0

    @property
    def count(self) -> int:
        return len(self.owners)

    def owner_url(self, index: int) -> str | None:
        return self.owners[index]

    async def refresh(self) -> None:
        self.heartbeats += 1

    def shard(self, index: int) -> Any:
        raise ShardUnavailable("no shard is here")

    async def topology(self) -> Any:
        missing = [index for index, owner in enumerate(self.owners) if owner is None]
        return SimpleNamespace(missing=missing, shards=[SimpleNamespace(url=owner) for owner in self.owners])


class Body(httpx.AsyncByteStream):
    """The body of an owner's answer, which notes how many chunks were read, and that it was closed.

    error: ends it behind its chunks.
    """

    def __init__(self, *chunks: bytes, error: Exception | None = None) -> None:
        self.chunks = chunks
        self.read = 0
        self.is_closed = False
        self._error = error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            self.read += 1
            yield chunk
        if self._error is not None:
            raise self._error

    async def aclose(self) -> None:
        self.is_closed = True


def answered(content: bytes = b"", status: int = 200) -> httpx.Response:
    """An owner's answer, which has not been read."""
    return httpx.Response(status, stream=Body(content))


def relay_to(owner: Owner, stall_s: float = 30.0) -> Relay:
    """A relay whose requests an owner answers in this process."""
    return Relay(httpx.AsyncClient(transport=httpx.MockTransport(owner)), Secret(), stall_s)  # type: ignore[arg-type]


def shard_of(request: httpx.Request) -> int:
    assert request.url.params["of"] == "2"
    return int(request.url.params["shard"])


def problem(slug: str, status: int, headers: Mapping[str, str] | None = None) -> httpx.Response:
    """A refusal."""
    document = {"type": f"urn:freestep:problem:{slug}", "title": slug, "status": status, "detail": slug}
    return httpx.Response(status, json=document, headers=headers)
