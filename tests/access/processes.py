"""Processes on one Redis, each with its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freestep.api.tokens import TokenRequest
from freestep.errors import Unauthenticated
from freestep_service.access.tokens import Tokens
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.store import Store
from freestep_service.coordination.tokens import SharedTokens
from freestep_service.runs.resources import Disk
from freestep_service.storage.local import LocalStorage
from freestep_service.storage.token_files import TokenFiles

PUSH = TokenRequest(name="fleet", scope="push", runs="mnist-*")
PATIENCE_S = 60.0


@dataclass
class Service:
    """Starts processes on one Redis, and ends them with the test."""

    url: str
    folder: Path
    stack: AsyncExitStack
    now: float = 1_000_000.0
    disk: Disk = field(default_factory=Disk)

    async def start(self, name: str = "one") -> Tokens:
        """The tokens of a process; `name` is its storage, which is shared with those of that name."""
        store = await Store.connect(self.url)
        self.stack.push_async_callback(store.close)
        channels = Channels(store)
        await channels.start(lambda message: None)
        self.stack.push_async_callback(channels.close)
        files = TokenFiles(LocalStorage(self.folder / name))
        tokens = Tokens(SharedTokens(store), files, self.disk, channels, lambda: self.now)
        await tokens.read()
        await tokens.start()
        self.stack.push_async_callback(tokens.close)
        return tokens


def run(url: str, folder: Path, work: Callable[[Service], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S), AsyncExitStack() as stack:
            await work(Service(url, folder, stack))

    asyncio.run(bounded())


async def until(condition: Callable[[], Any]) -> None:
    """The time out of `run` ends it."""
    while not condition():
        await asyncio.sleep(0.005)


def bearing(text: str) -> bytes:
    """A token as requests carry it."""
    return f"Bearer {text}".encode()


async def is_good(tokens: Tokens, text: str) -> bool:
    """What a request is told, whether these credentials were seen before or not."""
    known = tokens.known(bearing(text))
    try:
        found = await tokens.find(bearing(text))
        assert known in (None, found) and tokens.known(bearing(text)) == found
    except Unauthenticated:
        return False
    return True


async def until_refused(tokens: Tokens, text: str) -> None:
    """The time out of `run` ends it."""
    while await is_good(tokens, text):
        await asyncio.sleep(0.005)
