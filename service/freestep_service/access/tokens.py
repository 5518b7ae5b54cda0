"""The tokens of the service, as this process knows them.

They are in Redis and in every process's storage, and what both hold counts together: a token that either has lets its
bearer in, and one that either knows as revoked lets nobody in. So neither loss of Redis, nor a Redis with older data,
nor a restart, lets anybody in or locks anybody out. Each process keeps what it knows up to date by messages, and by
reading anew every few seconds, which bounds how long a revoked token may be good at a process that missed the message.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from freestep.api.token_form import begins_as_token, make_token, scope_of
from freestep.api.tokens import TokenRequest
from freestep.errors import CoordinatorUnavailable, MalformedRequest, StorageUnavailable, TokenNotFound, Unauthenticated
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.tokens import TOKENS_CHANNEL, SharedTokens
from freestep_service.domain.quotas import Quota
from freestep_service.domain.tokens import Token, digest_of, id_of
from freestep_service.runs.resources import Disk
from freestep_service.storage.token_files import TokenFiles

if TYPE_CHECKING:
    # It needs the packages of an extra.
    from freestep_service.access.issuer import Issuer

__all__ = ["Tokens"]

logger = logging.getLogger("freestep")

_REFRESH_S = 5.0
_REREAD_S = 1.0
"""Seconds after which storage is read anew for a token that is not known, while Redis is away."""
_MOST_SEEN = 4096
_KEPT_S = 24 * 3600
"""Seconds for which a token is kept after it has expired: more than any two clocks differ."""


class Tokens:
    """The tokens of the service: found by their text, made and revoked.

    clock: seconds since 1970. issuer: verifies tokens that are not of the service's own form.
    """

    def __init__(
        self,
        shared: SharedTokens,
        files: TokenFiles,
        disk: Disk,
        channels: Channels,
        clock: Callable[[], float] = time.time,
        *,
        issuer: Issuer | None = None,
    ) -> None:
        self._shared = shared
        self._files = files
        self._disk = disk
        self._channels = channels
        self._issuer = issuer
        self._clock = clock
        self._known: dict[str, Token] = {}
        """By their ids, revoked ones among them."""
        self._filed: dict[str, Token] = {}
        """What this process's storage holds."""
        self._untold: set[str] = set()
        """The ids of tokens that were revoked here, of which Redis and storage were not both told in time."""
        self._seen: dict[bytes, str] = {}
        """The ids of tokens that requests carried, by the digests of their credentials."""
        self._uses: dict[str, int] = {}
        """When requests here carried tokens last, by their ids, as far as Redis was not told."""
        self._writing = asyncio.Lock()
        """Held while storage is written, so that no older state of a token takes the place of a newer one."""
        self._rereading = asyncio.Lock()
        self._reread_at = 0.0
        """When storage may be read again for a token that is not known."""
        self._has_news = asyncio.Event()
        self._is_closing = False
        self._cannot_write = False
        self._refreshing: asyncio.Task[None] | None = None

    async def read(self) -> None:
        """Reads the tokens in storage, and changes nothing. Raises StorageUnavailable, NewerFormat of it."""
        for token in await self._disk.run(self._files.read):
            self._known[token.id] = self._filed[token.id] = token

    async def start(self) -> None:
        """Exchanges what was read with Redis, and goes on doing so. Raises CoordinatorUnavailable."""
        await self._share()
        await self._channels.subscribe(TOKENS_CHANNEL, self._on_message)
        self._refreshing = asyncio.create_task(self._refresh())

    async def close(self) -> None:
        """Writes what has not been written."""
        # Not cancelled: a command that is cut short leaves its connection behind.
        self._is_closing = True
        self._has_news.set()
        if self._refreshing is not None:
            await self._refreshing

    def known(self, credentials: bytes) -> Token | None:
        """The token in credentials that were found before, if it is good: what every request of a worker costs.

        They are looked up by their SHA-256: no time that this takes says anything of those that would be found.
        """
        digest = hashlib.sha256(credentials).digest()
        token = self._known.get(self._seen.get(digest, ""))
        if token is None and self._issuer is not None:
            return self._issuer.known(digest)
        if token is None or not token.is_good(now := self._clock()):
            return None
        self._uses[token.id] = int(now)
        return token

    def is_good(self, token: Token) -> bool:
        """Whether a token that was found before still lets its bearer in."""
        if self._issuer is not None and not self._issuer.is_good(token):
            return False
        return self._known.get(token.id, token).is_good(self._clock())

    async def find(self, credentials: bytes) -> Token:
        """The token in credentials as a request has them: Bearer and a text. Another process may just have made it.

        Raises Unauthenticated, CoordinatorUnavailable where that cannot be told while Redis is away, and what
        `Issuer.verify` raises.
        """
        scheme, _, text = credentials.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated("the header Authorization must be Bearer and a token")
        digest, text = hashlib.sha256(credentials).digest(), text.strip()
        if self._issuer is not None and not begins_as_token(text):
            return await self._issuer.verify(text, digest)
        token = await self._find(text)
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen[digest] = token.id
        self._uses[token.id] = int(self._clock())
        return token

    async def _find(self, text: str) -> Token:
        try:
            scope_of(text)
        except ValueError as error:
            raise Unauthenticated(str(error)) from None
        digest = digest_of(text)
        token_id = id_of(digest)
        if token_id not in self._known:
            try:
                found = await self._shared.find(token_id)
            except CoordinatorUnavailable:
                # It may be in a storage that processes share.
                await self._reread_files()
                if token_id not in self._known:
                    raise
            else:
                self._learn([found] if found else [])
        token = self._known.get(token_id)
        if token is None or token.is_revoked or not token.is_of(digest):
            raise Unauthenticated("the token is unknown, or was revoked")
        if token.has_expired(self._clock()):
            raise Unauthenticated("the token has expired")
        return token

    async def all(self) -> list[tuple[Token, int | None]]:
        """The tokens that are good, oldest first, and when each was used last. Raises CoordinatorUnavailable."""
        await self._share()
        uses, now = await self._shared.uses(), self._clock()
        good = sorted(
            (token for token in self._known.values() if token.is_good(now)), key=lambda token: token.created_at
        )
        return [(token, uses.get(token.id)) for token in good]

    async def create(self, wish: TokenRequest) -> tuple[Token, str]:
        """A new token and its text, which is nowhere else. Raises CoordinatorUnavailable and StorageUnavailable."""
        if wish.workers is not None and wish.scope == "read":
            raise MalformedRequest("workers: a token of scope read takes no lease", field="workers")
        now, text = int(self._clock()), make_token(wish.scope)
        ends = None if wish.expires_in is None else now + wish.expires_in
        quota = Quota(wish.max_runs, wish.max_parameters, wish.max_leases, wish.max_bytes_per_minute)
        token = Token(wish.name, wish.scope, digest_of(text), now, wish.runs, wish.workers, ends, quota=quota)
        try:
            await self._put(token)
        except CoordinatorUnavailable:
            # Nobody knows its text.
            await self._forget([token.id])
            raise
        return token, text

    async def revoke(self, token_id: str) -> Token:
        """Ends a token at all processes: here at once, whatever fails. Raises TokenNotFound.

        Raises CoordinatorUnavailable and StorageUnavailable where Redis or storage does not have it yet: another call
        gives it to them, and so does each refresh.
        """
        if token_id not in self._known:
            await self._share()
        token = self._known.get(token_id)
        if token is None or not (token.is_good(self._clock()) or token_id in self._untold):
            raise TokenNotFound(f"there is no token {token_id!r}")
        revoked = token.revoked()
        self._untold.add(token_id)
        self._learn([revoked])
        # Others first: storage may be full, or hang.
        await self._tell(revoked)
        async with self._writing:
            await self._write(revoked)
        self._untold.discard(token_id)
        return token

    async def register(self, text: str, name: str) -> bool:
        """Makes a text that was made elsewhere a token for all runs, unless it is one; False if it was revoked.

        Raises CoordinatorUnavailable, and ValueError if the text is none of a token.
        """
        token = Token(name, scope_of(text), digest_of(text), int(self._clock()))
        if token.id not in self._known:
            await self._shared.put(token)
            self._learn([token])
        return not self._known[token.id].is_revoked

    async def _put(self, token: Token) -> None:
        """Storage first: what others hear of is durable."""
        async with self._writing:
            await self._write(token)
        await self._tell(token)

    async def _write(self, token: Token) -> None:
        """Writes a token to storage; called under the lock. Raises StorageUnavailable."""
        await self._disk.run(self._files.write, token)
        self._filed[token.id] = token

    async def _tell(self, token: Token) -> None:
        """Has the other processes and this one know a token. Raises CoordinatorUnavailable."""
        await self._shared.put(token)
        self._learn([token])
        with suppress(CoordinatorUnavailable):
            # Who does not hear of it reads it in time.
            await self._channels.publish({"token": token.to_json()}, TOKENS_CHANNEL)

    def _learn(self, tokens: Iterable[Token]) -> None:
        for token in tokens:
            if not _is_as_new(self._known.get(token.id), token):
                self._known[token.id] = token
                self._has_news.set()

    def _on_message(self, message: dict[str, Any] | None) -> None:
        if message is None:
            # Messages may have been missed.
            self._has_news.set()
        else:
            self._learn([Token.from_json(message["token"])])

    async def _refresh(self) -> None:
        while not self._is_closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_S):
                    await self._has_news.wait()
            self._has_news.clear()
            try:
                await self._exchange()
            except Exception:
                logger.exception("the tokens could not be read anew")

    async def _exchange(self) -> None:
        """Reads what others have made and revoked, and gives Redis and storage what they lack."""
        try:
            await self._share()
            await self._note_uses()
        except CoordinatorUnavailable:
            # Of processes that share a storage, one may have revoked a token before Redis went away.
            self._learn(await self._read_files())
        await self._file()

    async def _share(self) -> None:
        """Takes over what Redis has, and gives it what it lacks. Raises CoordinatorUnavailable."""
        found = {token.id: token for token in await self._shared.read()}
        self._learn(found.values())
        over = [token.id for token in self._known.values() if token.has_expired(self._clock() - _KEPT_S)]
        if over:
            await self._shared.remove(over)
            await self._forget(over)
        for token in list(self._known.values()):
            if not _is_as_new(found.get(token.id), token):
                await self._shared.put(token)

    async def _forget(self, ids: list[str]) -> None:
        async with self._writing:
            for token_id in ids:
                self._known.pop(token_id, None)
                with suppress(StorageUnavailable):
                    await self._disk.run(self._files.remove, token_id)
                    self._filed.pop(token_id, None)

    async def _file(self) -> None:
        """Gives storage what it lacks; a failure is logged once, and repeated with the next refresh."""
        for token_id in list(self._known):
            async with self._writing:
                token, filed = self._known.get(token_id), self._filed.get(token_id)
                if token is None or _is_as_new(filed, token):
                    continue
                try:
                    await self._write(token)
                except StorageUnavailable as error:
                    if not self._cannot_write:
                        logger.warning("tokens cannot be kept beside the checkpoints: %s", error)
                    self._cannot_write = True
                    return
        self._cannot_write = False

    async def _reread_files(self) -> None:
        """Takes over what storage has, for all who ask within a second."""
        async with self._rereading:
            now = asyncio.get_running_loop().time()
            if now >= self._reread_at:
                self._reread_at = now + _REREAD_S
                self._learn(await self._read_files())

    async def _read_files(self) -> list[Token]:
        with suppress(StorageUnavailable):
            return await self._disk.run(self._files.read)
        return []

    async def _note_uses(self) -> None:
        uses, self._uses = self._uses, {}
        if uses:
            try:
                await self._shared.note_uses(uses)
            except CoordinatorUnavailable:
                self._uses = uses | self._uses
                raise


def _is_as_new(kept: Token | None, token: Token) -> bool:
    """Whether a place that keeps a state of a token, or none, need not be given another: all that changes is that it is
    revoked."""
    return kept is not None and (kept.is_revoked or not token.is_revoked)
