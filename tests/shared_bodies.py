"""A client's side of shared memory, written by the protocol's document and not with the client library."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from freestep_service.state.memory_budget import MemoryBudget
from harness import ThreadService
from plain_calls import BODY, Api

__all__ = ["Handed", "budget", "fetch", "memory_files", "memory_of", "offered", "shared_bytes", "show"]


def memory_files() -> set[tuple[str, int]]:
    """The descriptors of memory that this process has open, each with what tells it from others of its number."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        # That of the listing itself is closed by now.
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith(("/memfd:", "/dev/null")):
                found.add((number, os.stat(f"/proc/self/fd/{number}").st_ino))
    return found


@dataclass
class Handed:
    """A memory that a service has handed over, and the connection that it lasts as long as."""

    connection: socket.socket
    memory: memoryview
    grant: dict[str, Any]
    api: Api
    lease: Mapping[str, Any]

    def headers(self, begin: int, end: int, step: int, key: str | None = None, **more: str) -> dict[str, str]:
        """Of a push whose body lies there."""
        return self.api.headers(
            self.lease, step, key, Freestep_Memory=self.grant["memory"], Freestep_Span=f"{begin}-{end}", **more
        )

    def push(self, step: int, key: str | None = None, body: bytes = BODY, **more: str) -> httpx.Response:
        """Pushes a body that is laid at the memory's beginning."""
        self.memory[: len(body)] = body
        headers = self.headers(0, len(body), step, key, **more)
        return self.api.http.post(self.api.path("/gradients"), headers=headers)

    def body(self, answer: httpx.Response) -> bytes:
        """The body of an answer that lies there."""
        assert answer.headers["Content-Length"] == "0"
        begin, end = map(int, answer.headers["Freestep-Span"].split("-"))
        return bytes(self.memory[begin:end])

    @property
    def is_over(self) -> bool:
        """Whether the service gives it up, within a minute."""
        self.connection.settimeout(60)
        return self.connection.recv(1) == b""

    def close(self) -> None:
        self.connection.close()


def offered(api: Api, lease: Mapping[str, Any], body: int = 4096, answer: int = 4096, **more: Any) -> httpx.Response:
    """What a service answers to who asks for memory."""
    wish = {"token": lease["token"], "body_bytes": body, "answer_bytes": answer, **more}
    return api.http.post(api.path(f"/leases/{lease['lease']}/memory"), json=wish)


def fetch(api: Api, lease: Mapping[str, Any], body: int = 4096, answer: int = 4096, **more: Any) -> Handed:
    """A memory of a service's."""
    answered = offered(api, lease, body, answer, **more)
    assert answered.status_code == 201, answered.text
    connection, line, descriptors = show(answered.json())
    assert len(descriptors) == 1
    grant = httpx.Response(200, content=line).json()
    memory = mmap.mmap(descriptors[0], grant["size"])
    os.close(descriptors[0])
    return Handed(connection, memoryview(memory), grant, api, lease)


def show(offer: Mapping[str, str]) -> tuple[socket.socket, bytes, list[int]]:
    """Shows a ticket; the connection, the line that comes, and the descriptors beside it."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(60)
    connection.connect("\0" + offer["socket"])
    try:
        connection.sendall(offer["ticket"].encode() + b"\n")
        line, descriptors, _, _ = socket.recv_fds(connection, 4096, 2)
    except (BrokenPipeError, ConnectionResetError):
        # It was closed before the ticket was read.
        return connection, b"", []
    return connection, line, descriptors


def budget(service: ThreadService) -> MemoryBudget:
    return service.registry._resources.memory


def memory_of(handed: Handed) -> dict[str, str]:
    return {"Freestep-Memory": handed.grant["memory"]}


def shared_bytes(api: Api) -> float:
    """What the metrics have of it."""
    lines = api.http.get("/metrics").text.splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith("freestep_shared_memory_bytes ")]
    return float(value)
