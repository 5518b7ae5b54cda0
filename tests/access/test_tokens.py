"""Tokens at several processes on one Redis: made at one they are good at all, revoked at one they are good at none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from access.processes import PUSH, Service, bearing, is_good, run, until_refused
from freestep.api.token_form import make_token
from freestep.api.tokens import TokenRequest
from freestep.errors import CoordinatorUnavailable, MalformedRequest, TokenNotFound, Unauthenticated
from freestep_service.coordination.channels import Channels
from freestep_service.coordination.tokens import TOKENS_KEY
from freestep_service.domain.tokens import Token, digest_of, id_of
from freestep_service.storage.local import LocalStorage
from freestep_service.storage.token_files import TokenFiles


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
