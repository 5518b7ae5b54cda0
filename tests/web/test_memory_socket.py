"""The Unix socket that memory is had from: its tickets, and who is at the other end."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pytest

from freestep_service.state.shared_memory import IS_POSSIBLE
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import Api, slug
from shared_bodies import Handed, fetch, offered, show

pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="there is no such memory on this system")

UNKNOWN = "0" * 32
_NOBODY = 65534
_CLONE_NEWNET = 0x40000000


def test_offers_that_nobody_fetches_keep_no_memory_from_others(watched: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.web.memories._MOST", 1)
    offers = [offered(watched, watched.lease(worker)).json() for worker in "ab"]
    handed = fetch(watched, watched.lease())
    # There is one now.
    for offer in offers:
        connection, line, descriptors = show(offer)
        assert (line, descriptors) == (b"", [])
        connection.close()
    handed.close()


def test_there_are_so_many_memories(watched: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.web.memories._MOST", 1)
    first = fetch(watched, watched.lease())
    other = watched.lease("other")
    assert slug(offered(watched, other)) == "memory-not-shared"
    # It replaces its own.
    second = fetch(watched, first.lease)
    for each in (first, second):
        each.close()
    wait_until(lambda: offered(watched, other).status_code == 201)


def test_a_ticket_is_good_once(api: Api, share: Callable[..., Handed]) -> None:
    api.create()
    offer = offered(api, api.lease()).json()
    first, line, descriptors = show(offer)
    assert line and descriptors
    second, line, none = show(offer)
    assert (line, none) == (b"", [])
    for connection in (first, second):
        connection.close()
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("ticket", ["", UNKNOWN, "x" * 1000, "\xff\xfe"])
def test_a_wrong_ticket_gets_nothing(api: Api, ticket: str) -> None:
    api.create()
    offer = offered(api, api.lease()).json()
    connection, line, descriptors = show({**offer, "ticket": ticket})
    assert (line, descriptors) == (b"", [])
    connection.close()


def test_a_ticket_that_nobody_shows_runs_out(
    watched: Api, watched_service: ThreadService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep_service.web.memories._TICKET_S", 0.05)
    offer = offered(watched, watched.lease()).json()
    memories = watched_service.app.state.context.memories
    wait_until(lambda: offer["ticket"] not in memories._tickets)
    connection, line, descriptors = show(offer)
    assert (line, descriptors) == (b"", [])
    connection.close()


def test_a_service_without_a_unix_socket_shares_none(
    start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The name of the socket is too long for the system then.
    monkeypatch.setattr("freestep_service.web.memories._TICKET_BYTES", 100)
    api = Api(start_service().url)
    api.create()
    lease = api.lease()
    assert slug(offered(api, lease)) == "memory-not-shared"
    assert api.push(lease, 0).json()["decision"] == "applied"
    assert api.http.get("/readyz").json()["shared_memory"] is None
    assert sum("no memory is shared" in record.getMessage() for record in caplog.records) == 1
    api.http.close()


def _from_another_network(offer: dict[str, str], said: Any) -> None:
    assert ctypes.CDLL(None).unshare(_CLONE_NEWNET) == 0
    try:
        show(offer)
    except ConnectionRefusedError:
        said.send("refused")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave its network namespace")
def test_another_network_namespace_has_no_such_socket(api: Api) -> None:
    api.create()
    ours, theirs = get_context("fork").Pipe()
    offer = offered(api, api.lease()).json()
    child = get_context("fork").Process(target=_from_another_network, args=(offer, theirs))
    child.start()
    theirs.close()
    assert ours.recv() == "refused"
    child.join()


def _as_nobody(offer: dict[str, str], said: Any) -> None:
    os.setuid(_NOBODY)
    _, line, descriptors = show(offer)
    said.send((line, len(descriptors)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_nothing_for_a_ticket(api: Api) -> None:
    api.create()
    offer = offered(api, api.lease()).json()
    ours, theirs = get_context("fork").Pipe()
    child = get_context("fork").Process(target=_as_nobody, args=(offer, theirs))
    child.start()
    theirs.close()
    assert ours.recv() == (b"", 0)
    child.join()
    # It is good still, where it is shown by whom it was made for.
    connection, line, descriptors = show(offer)
    assert line and descriptors
    connection.close()
    os.close(descriptors[0])


def unix_names() -> list[str]:
    with open("/proc/net/unix") as table:
        return [line.split()[-1] for line in table]


def test_it_does_not_matter_how_a_client_behaves_at_the_socket(api: Api) -> None:
    api.create()
    offer = offered(api, api.lease()).json()
    idle = []
    for _ in range(100):
        idle.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        idle[-1].connect("\0" + offer["socket"])
    for each in idle:
        each.close()

    def is_handed() -> bool:
        connection, line, descriptors = show(offered(api, api.lease()).json())
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)
        return bool(line)

    wait_until(is_handed)


def test_nothing_is_left_of_a_service(start_service: Callable[..., ThreadService]) -> None:
    service = start_service()
    api = Api(service.url)
    api.create()
    handed = fetch(api, api.lease())
    name = f"@{offered(api, api.lease('other')).json()['socket']}"
    assert name in unix_names()
    service.stop()
    assert handed.is_over
    assert name not in unix_names()
    handed.close()
    api.http.close()
