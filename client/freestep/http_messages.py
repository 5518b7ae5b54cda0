"""HTTP/1.1 messages as bytes (RFC 9112): the head of a request, the framing of its body, and an answer that is read.

The law of this file: no IO. llhttp, with which Node.js reads HTTP, reads answers. It is given what comes, but of a body
whose length the head says only what came with the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import httptools
import httpx

__all__ = ["AnswerReader", "Headers", "framed", "request_head"]

Headers = Iterable[tuple[bytes, bytes]]

_LONGEST_HEAD = 100 * 1024
"""As httpx's own limit."""
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET = re.compile(rb"[\x21-\x7e]+")
_VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff]+(?:[\t ]+[\x21-\x7e\x80-\xff]+)*)?")
_NO_BODY = (204, 304)


def request_head(method: bytes, target: bytes, headers: Headers) -> bytes:
    """The head of a request. Raises LocalProtocolError, without its values, where it would be none."""
    if not _TOKEN.fullmatch(method) or not _TARGET.fullmatch(target):
        raise httpx.LocalProtocolError("Illegal method or target")
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    for name, value in headers:
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise httpx.LocalProtocolError("Illegal header name or value")
        lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join([*lines, b"", b""])


def framed(pieces: Iterable[bytes | memoryview], headers: Headers) -> Iterator[bytes | memoryview]:
    """A body as the head says: in chunks, or of its Content-Length, of zero bytes if there is none.

    Raises LocalProtocolError where it has another length.
    """
    fields = {name.lower(): value for name, value in headers}
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        for piece in pieces:
            if piece:
                yield b"%x\r\n" % len(piece)
                yield piece
                yield b"\r\n"
        yield b"0\r\n\r\n"
        return
    missing = int(fields.get(b"content-length", 0))
    for piece in pieces:
        missing -= len(piece)
        if missing < 0:
            raise httpx.LocalProtocolError("Too much data for declared Content-Length")
        yield piece
    if missing:
        raise httpx.LocalProtocolError("Too little data for declared Content-Length")


class AnswerReader:
    """Reads one answer. Attributes are those of its head, once that is there.

    method: of the request. Its methods raise RemoteProtocolError where the bytes are no answer.
    """

    def __init__(self, method: str) -> None:
        self.has_head = False
        """Whether the head of the answer has come; before, there may be interim ones."""
        self.is_complete = False
        """Whether the whole answer has come."""
        self.status = 0
        self.reason = b""
        self.version = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.missing: int | None = None
        """Bytes of the body that have not come, where the head says its length; None where its end is marked."""
        self.is_last = True
        """Whether nothing more may be sent or come on the connection."""
        self._method = method
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._head_size = 0
        self._ends_with_connection = False

    def feed(self, data: bytes) -> None:
        """Takes the bytes that have come."""
        if self.is_complete:
            self.is_last = True
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise httpx.RemoteProtocolError("the server changed to another protocol") from None
        except httptools.HttpParserError as error:
            if not self.is_complete:
                raise httpx.RemoteProtocolError(f"what the server sent is not HTTP: {error}") from error
            self.is_last = True
        if not self.has_head:
            self._head_size += len(data)
            if self._head_size > _LONGEST_HEAD:
                raise httpx.RemoteProtocolError(f"the head of the answer is longer than {_LONGEST_HEAD} bytes")

    def end(self) -> None:
        """The connection has ended."""
        self.is_last = True
        if not self.has_head:
            raise httpx.RemoteProtocolError("the server closed the connection without an answer")
        if not self._ends_with_connection and not self.is_complete:
            raise httpx.RemoteProtocolError("the answer's body ended early")
        self.is_complete = True

    def take(self) -> list[bytes]:
        """What has come of the body since it was last taken."""
        body, self._body = self._body, []
        return body

    def received(self, size: int) -> None:
        """So many bytes of the body have come that were not fed."""
        assert self.missing is not None
        self.missing -= size
        self.is_complete = not self.missing

    # What llhttp finds

    def on_message_begin(self) -> None:
        if self.is_complete:
            # More than was asked for.
            self.is_last = True

    def on_status(self, status: bytes) -> None:
        if not self.is_complete:
            self.reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.is_complete:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self.headers, self.reason = [], b""
            return
        self.has_head, self.status = True, status
        self.version = self._parser.get_http_version().encode()
        self.is_last = not self._parser.should_keep_alive()
        fields = {name.lower(): value for name, value in self.headers}
        if self._method == "HEAD" or status in _NO_BODY:
            self.missing = 0
            # llhttp does not know what was asked.
            self.is_complete = True
        elif b"transfer-encoding" in fields:
            self._ends_with_connection = not fields[b"transfer-encoding"].lower().endswith(b"chunked")
        elif b"content-length" in fields:
            self.missing = int(fields[b"content-length"])
            self.is_complete = not self.missing
        else:
            self._ends_with_connection = True

    def on_body(self, body: bytes) -> None:
        if self.is_complete:
            self.is_last = True
            return
        self._body.append(body)
        if self.missing is not None:
            self.received(len(body))

    def on_message_complete(self) -> None:
        if self.has_head:
            self.is_complete = True
