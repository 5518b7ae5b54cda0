"""Whose process is at the other end of a Unix socket."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest

import freestep.wire.unix_peers
from freestep.wire.unix_peers import is_of_this_user

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux names peers so")

_OTHER = 12345


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as made:
        # The kernel gives it a name.
        made.bind("")
        made.listen()
        yield made


def test_this_process_is_of_its_user(listening: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(listening.getsockname())
        other, _ = listening.accept()
        with other:
            assert is_of_this_user(one) and is_of_this_user(other)


def test_nobody_is_of_the_user_by_whom_strangers_are_named(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freestep.wire.unix_peers, "_stranger", os.geteuid)
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(listening.getsockname())
        assert not is_of_this_user(one)


def test_the_kernel_tells_by_whom_strangers_are_named() -> None:
    freestep.wire.unix_peers._stranger.cache_clear()
    assert freestep.wire.unix_peers._stranger() == int(freestep.wire.unix_peers._STRANGER.read_text())


def _connect(name: bytes, said: Connection) -> None:
    os.setuid(_OTHER)
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(name)
        said.send(is_of_this_user(one))
        one.recv(1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_not(listening: socket.socket) -> None:
    ours, theirs = get_context("fork").Pipe()
    child = get_context("fork").Process(target=_connect, args=(listening.getsockname(), theirs))
    child.start()
    other, _ = listening.accept()
    with other:
        assert not is_of_this_user(other)
        assert ours.recv() is False
    child.join()
    assert child.exitcode == 0
