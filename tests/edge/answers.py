"""Raw requests to a service, and its answers as they stand on the connection."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

from raw_pushes import connected

__all__ = ["Answer", "Peer", "dialled"]


@dataclass(frozen=True)
class Answer:
    """An answer: its status, its headers by lower-case name, and its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def read(cls, response: HTTPResponse) -> Answer:
        """The answer whose head was parsed."""
        headers = {name.lower(): value for name, value in response.getheaders()}
        return cls(response.status, headers, response.read())

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def slug(self) -> str:
        """The end of a problem's type."""
        assert self.headers["content-type"] == "application/problem+json", self
        return str(self.document["type"]).rpartition(":")[2]


class Peer:
    """A connection to a service on which a test writes what it likes, and reads answers one after another."""

    def __init__(self, made: socket.socket) -> None:
        self.socket = made
        self._reader = made.makefile("rb")

    def send(self, *pieces: bytes) -> None:
        """Sends pieces, each as a segment of its own as far as the system has it so."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            self.socket.sendall(piece)

    def end(self) -> None:
        """Closes the sending side."""
        self.socket.shutdown(socket.SHUT_WR)

    def answer(self, method: str = "GET") -> Answer:
        """The next answer, which is to a request of that method."""
        response = HTTPResponse(self.socket, method=method)
        response.fp = _Kept(self._reader)  # type: ignore[assignment]
        response.begin()
        return Answer.read(response)

    def answers(self) -> list[Answer]:
        """All answers up to the end of the connection."""
        found = []
        while self._reader.peek(1):
            found.append(self.answer())
        return found

    def is_at_its_end(self) -> bool:
        """Whether the service has ended the connection, with nothing more to read."""
        try:
            return self._reader.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._reader.close()
        self.socket.close()


class _Kept:
    """A reader that outlives the answer that is read from it."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def close(self) -> None:
        pass


@contextmanager
def dialled(url: str, trusted: ssl.SSLContext | None = None) -> Iterator[Peer]:
    """A connection to a service, closed with the block."""
    peer = Peer(connected(url, trusted))
    try:
        yield peer
    finally:
        peer.close()
