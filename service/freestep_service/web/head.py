"""The head of a request: what RFC 9110 and RFC 9112 ask of it beyond what its parser checks.

What two readers of the same bytes could take for different requests is refused, and the connection ends with it: behind
a proxy, the one's body would be the other's next request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import httptools
from starlette.responses import Response

from freestep.errors import HeadersTooLarge, MalformedRequest, Overloaded
from freestep_service.settings import Settings
from freestep_service.web.problems import (
    problem_response,
    unsupported_transfer_coding_response,
    unsupported_version_response,
)

__all__ = ["Bounds", "Head", "Refused", "too_large", "too_many"]

_VERSIONS = ("1.1", "1.0")
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(:[0-9]*)?")
_URL = re.compile(rb"[^:/?#]*://([^/?#]*)(.*)")
_EXPECTS = re.compile(rb"(?:^|,)[ \t]*100-continue[ \t]*(?:,|$)", re.IGNORECASE)
_SEPARATORS = 4
"""Bytes of a field's colon, space and end of line."""


@dataclass(frozen=True)
class Bounds:
    """How long a head may be, and for how many seconds it may take to come, a connection may be idle, and its peer may
    take nothing of an answer.

    small_bytes: of a body that is likely to arrive together with the head of its request; a larger one has an Inlet.
    unanswered: requests of a connection that have come and were not answered.
    """

    head_bytes: int = 64 * 1024
    head_fields: int = 100
    head_seconds: float = 10.0
    idle_seconds: float = 60.0
    stall_seconds: float = 10.0
    small_bytes: int = 64 * 1024
    unanswered: int = 64

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        seconds = settings.head_seconds, settings.idle_seconds, settings.stall_seconds
        return cls(settings.head_bytes, settings.head_fields, *seconds)


class Refused(Exception):
    """A request is not run: the answer, which is the connection's last."""

    def __init__(self, answer: Response) -> None:
        super().__init__(answer.status_code)
        self.answer = answer


def too_large(bounds: Bounds) -> Refused:
    """The refusal of a head beyond the bounds."""
    detail = f"the head of a request may have {bounds.head_bytes} bytes and {bounds.head_fields} fields"
    return Refused(problem_response(HeadersTooLarge(detail, bytes=bounds.head_bytes, fields=bounds.head_fields)))


def too_many(bounds: Bounds) -> Refused:
    """The refusal of a request behind as many others as may wait for their answers."""
    return Refused(
        problem_response(Overloaded(f"{bounds.unanswered} requests of the connection wait for their answers"))
    )


class Head(NamedTuple):
    """What a request is for, and how it is framed.

    target: path and query, of a target that is a whole URL too. length: the Content-Length in bytes; 0 without one.
    is_last: whether the parser cannot read on behind it. expects: whether the client waits to be asked for the body.
    """

    target: bytes
    length: int
    is_last: bool
    expects: bool

    @classmethod
    def read(
        cls,
        parser: httptools.HttpRequestParser,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        received: int,
        bounds: Bounds,
    ) -> Head:
        """Of a head that was parsed; `received` bytes are no fewer than it has. Raises Refused.

        headers: their names in lower case, their values without white space around them.
        """
        version = parser.get_http_version()
        if version not in _VERSIONS:
            raise Refused(unsupported_version_response(version))
        if len(headers) > bounds.head_fields or (received > bounds.head_bytes < _size(target, headers)):
            raise too_large(bounds)
        hosts, host, codings, length, expects = 0, b"", [], 0, False
        for name, value in headers:
            if name == b"host":
                hosts, host = hosts + 1, value
                if not _is_host(value):
                    raise _malformed("the header Host names no host")
            elif name == b"content-length":
                # The parser takes one that consists of digits.
                length = int(value)
            elif name == b"transfer-encoding":
                codings.append(value.lower())
            elif name == b"expect":
                # HTTP/1.0 knows no 100: RFC 9110, section 10.1.1.
                expects = expects or (version == "1.1" and _EXPECTS.search(value) is not None)
        if hosts != 1 and (hosts or version == "1.1"):
            raise _malformed(f"the header Host stands {hosts} times, and has to stand once")
        if b"#" in target:
            # Who goes by the path before it gets here may take that for a part of it (RFC 9112, section 3.2).
            raise _malformed("the request's target has a fragment, which is the client's alone")
        if not target.startswith(b"/"):
            target = _in_origin_form(target, host if hosts else None)
        if codings:
            if version == "1.0":
                raise _malformed("HTTP/1.0 knows no Transfer-Encoding")
            if codings != [b"chunked"]:
                raise Refused(unsupported_transfer_coding_response())
        # The parser takes what follows for another protocol, whatever the length says.
        is_last = parser.should_upgrade()
        if is_last and (length or codings or parser.get_method() == b"CONNECT"):
            raise _malformed("the service speaks HTTP/1.1: it changes to no other protocol behind this request")
        return cls(target, length, is_last, expects)


@lru_cache
def _is_host(value: bytes) -> bool:
    return _HOST.fullmatch(value) is not None


def _in_origin_form(target: bytes, host: bytes | None) -> bytes:
    """Path and query of a target that is a whole URL (RFC 9112, section 3.2.2); another one as it is. Raises Refused.

    host: the header Host, None without one: other readers go by the URL's.
    """
    url = _URL.fullmatch(target)
    if url is None:
        return target
    authority, rest = url.groups()
    if not authority:
        raise _malformed("the request's target is a URL without a host")
    if host is not None and authority.lower() != host.lower():
        raise _malformed("the request's target is at another host than the header Host names")
    return rest if rest.startswith(b"/") else b"/" + rest


def _size(target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> int:
    return len(target) + sum(map(len, chain.from_iterable(headers))) + _SEPARATORS * len(headers)


def _malformed(detail: str) -> Refused:
    return Refused(problem_response(MalformedRequest(detail)))
