"""Tokens in Redis, where the processes of a service find those that another one has made or revoked.

Each change is one command on one key, and none brings a revoked token back: a token is added only where there is none
of its id, and a revoked one takes the place of whatever is there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from freestep_service.coordination.store import Store, reachable
from freestep_service.domain.tokens import Token

__all__ = ["TOKENS_CHANNEL", "TOKENS_KEY", "TOKEN_USES_KEY", "SharedTokens"]

logger = logging.getLogger("freestep")

TOKENS_KEY = "freestep:tokens"
"""id -> token as JSON; it belongs to no run."""
TOKENS_CHANNEL = "freestep:tokens:messages"
TOKEN_USES_KEY = "freestep:tokens:uses"
"""id -> when a request carried the token last, in seconds since 1970."""


class SharedTokens:
    """The tokens of all processes on one Redis. Its methods raise CoordinatorUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def read(self) -> list[Token]:
        """All tokens, revoked ones among them."""
        with reachable():
            found: dict[str, str] = await self._store.client.hgetall(TOKENS_KEY)
        return [token for text in found.values() if (token := _decoded(text)) is not None]

    async def find(self, token_id: str) -> Token | None:
        """A token by its id."""
        with reachable():
            text = await self._store.client.hget(TOKENS_KEY, token_id)
        return None if text is None else _decoded(text)

    async def put(self, token: Token) -> None:
        """Adds a token unless there is one of its id; a revoked one takes the place of that."""
        with reachable():
            if token.is_revoked:
                await self._store.client.hset(TOKENS_KEY, token.id, token.to_json())
            else:
                await self._store.client.hsetnx(TOKENS_KEY, token.id, token.to_json())

    async def remove(self, ids: Iterable[str]) -> None:
        """Removes tokens that have expired, which let nobody in whether they are here or not."""
        with reachable():
            for key in (TOKENS_KEY, TOKEN_USES_KEY):
                await self._store.client.hdel(key, *ids)

    async def note_uses(self, uses: Mapping[str, int]) -> None:
        """Notes when tokens were used last, by their ids."""
        with reachable():
            await self._store.client.hset(TOKEN_USES_KEY, mapping=dict(uses))

    async def uses(self) -> dict[str, int]:
        """When tokens were used last, in seconds since 1970, by their ids."""
        with reachable():
            found: dict[str, str] = await self._store.client.hgetall(TOKEN_USES_KEY)
        return {token_id: int(seconds) for token_id, seconds in found.items()}


def _decoded(text: str) -> Token | None:
    """A token, None where Redis holds something else, which lets nobody in."""
    try:
        return Token.from_json(text)
    except ValueError:
        logger.error("what Redis holds as a token is none")
        return None
