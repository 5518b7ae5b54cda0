"""Tokens while Redis or storage is away.

Neither the loss of Redis, nor a Redis with older data, nor a restart lets anybody in or locks anybody out.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from redis import Redis

from access.processes import PUSH, Service, bearing, is_good, run, until, until_refused
from freestep.api.token_form import make_token
from freestep.errors import CoordinatorUnavailable, StorageUnavailable, TokenNotFound, Unauthenticated
from freestep_service.access import tokens as tokens_module
from freestep_service.coordination.tokens import TOKENS_KEY
from freestep_service.domain.tokens import Token, digest_of, id_of
from freestep_service.storage.local import LocalStorage
from freestep_service.storage.token_files import TokenFiles


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


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
