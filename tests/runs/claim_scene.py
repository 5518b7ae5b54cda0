"""Services with one of two Redises on one place, whose claims on it a test looks at."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from redis import Redis

from freestep_service.coordination.identity import IDENTITY_KEY
from freestep_service.coordination.store import Store
from freestep_service.runs.storage_claims import StorageClaims
from freestep_service.storage.claims import Claim, DirectoryClaim, ObjectClaim, StorageInUse
from freestep_service.storage.media import open_storage
from harness import store as started

__all__ = ["Scene", "identities", "two_stores"]


class Scene:
    """Services with one of two Redises, on one place, under a clock of their own."""

    def __init__(self, kind: str, folder: Path, urls: list[str]) -> None:
        self.urls = urls
        self.now = 100.0
        self._kind = kind
        self._folder = folder
        self.objects = open_storage(f"memory://{uuid.uuid4()}")
        self.lock = folder / "lock"
        self.lost: list[StorageInUse] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()

    def claim(self) -> Claim:
        if self._kind == "directory":
            return DirectoryClaim(self._folder)
        return ObjectClaim(self.objects, uuid.uuid4().hex)

    async def service(self, stack: AsyncExitStack, redis: int, claim: Claim | None = None) -> StorageClaims:
        store = await Store.connect(self.urls[redis])
        stack.push_async_callback(store.close)
        claims = StorageClaims(
            store, [claim or self.claim()], on_lost=self.lost.append, clock=self.clock, sleep=self.sleep
        )
        return await stack.enter_async_context(claims)


def identities(scene: Scene) -> list[str | None]:
    found = []
    for url in scene.urls:
        with Redis.from_url(url, decode_responses=True) as client:
            found.append(client.get(IDENTITY_KEY))
    return found


def two_stores(stack: ExitStack, tmp_path: Path) -> list[str]:
    """The URLs of two stores that know nothing of each other."""
    urls = []
    for name in ("redis-1", "redis-2"):
        (tmp_path / name).mkdir()
        urls.append(stack.enter_context(started("valkey", tmp_path / name)))
    return urls
