"""The session of a browser: its token in two halves, of which neither says anything without the other.

One half is a cookie that scripts cannot read; the other is kept by the page and sent as a header. Browsers send cookies
to every port of a host, and with requests that other pages make: what they send there is random bytes. So a request
that is made without the page has no token, and who listens on another port learns none.

The service keeps nothing of a session. It outlasts a restart, is good at every process of the service, and ends with
its token.
"""

from __future__ import annotations

import re
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response

from freestep.errors import MalformedRequest, Unauthenticated

__all__ = ["SESSION_HEADER", "begin_session", "end_session", "own_cookies", "session_credentials"]

SESSION_HEADER = "freestep-session"
"""The header with the page's half: the port that names the cookie, a dot, and the half."""
_COOKIE = "freestep-"
_LASTS_S = 7 * 24 * 3600
_LONGEST = 2600
"""Bytes of a token whose half fits a cookie, of which browsers take 4096 bytes."""
_PORT = re.compile(r":([0-9]{1,5})$")
_FORM = re.compile(r"([0-9]{1,5})\.([A-Za-z0-9_-]+)")
_PADDING = 4
_OWN_COOKIE = re.compile(rb"(?:^|;)[ \t]*(freestep-[0-9]{1,5}=[A-Za-z0-9_-]*)[ \t]*(?=;|$)")


def begin_session(request: Request, response: Response, token: str) -> str:
    """Sets the cookie in the answer to a request; the page's half, as its header has it. Raises MalformedRequest."""
    text = token.encode()
    if len(text) > _LONGEST:
        raise MalformedRequest(f"a token of more than {_LONGEST} bytes fits no cookie", field="token")
    half = secrets.token_bytes(len(text))
    port = _port(request)
    response.set_cookie(
        _COOKIE + port,
        _encoded(_xor(text, half)),
        max_age=_LASTS_S,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return f"{port}.{_encoded(half)}"


def own_cookies(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of a request without cookies that are of no session.

    Those of all services on the host are sent along, and Python takes seconds to read a quoted one of 50 KB, which
    anybody may send (CVE-2024-7592).
    """
    kept = [(name, b"; ".join(_OWN_COOKIE.findall(value)) if name == b"cookie" else value) for name, value in headers]
    return [(name, value) for name, value in kept if value or name != b"cookie"]


def end_session(request: Request, response: Response) -> None:
    """Has the browser forget the cookie."""
    response.delete_cookie(
        _COOKIE + _port(request), secure=request.url.scheme == "https", httponly=True, samesite="strict"
    )


def session_credentials(request: Request) -> bytes | None:
    """What the header Authorization would be, had the browser's page its token; None if the request is of no session.

    Raises Unauthenticated if a half is missing or none.
    """
    given = request.headers.get(SESSION_HEADER)
    if given is None:
        return None
    match = _FORM.fullmatch(given)
    cookie = request.cookies.get(_COOKIE + match[1]) if match is not None else None
    if match is None or cookie is None:
        raise Unauthenticated("the browser's session has ended: sign in again")
    try:
        halves = _decoded(match[2]), _decoded(cookie)
    except ValueError:
        raise Unauthenticated("the browser's session is none: sign in again") from None
    if len(halves[0]) != len(halves[1]):
        # Of two sign-ins.
        raise Unauthenticated("the browser's session is another one: sign in again")
    return b"Bearer " + _xor(*halves)


def _port(request: Request) -> str:
    """Names the cookie, since services on other ports of the host have their own."""
    match = _PORT.search(request.headers.get("host", ""))
    return match[1] if match is not None else "0"


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _encoded(half: bytes) -> str:
    return urlsafe_b64encode(half).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    """Raises ValueError."""
    return urlsafe_b64decode(text + "=" * (-len(text) % _PADDING))
