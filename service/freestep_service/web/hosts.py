"""Refuses requests that a web page has made: through a host name that is not the service's, or from another origin.
Takes the cookies off the others that are not the service's.

A page of any site may have its visitor's browser send requests to addresses that only the visitor reaches, and, where
the page's own name leads to such an address (DNS rebinding), read the answers too. The name that a browser believes to
talk to is in `Host`, and where it comes from in `Origin` and `Sec-Fetch-Site`. An address is no name that could lead
elsewhere. Other clients send no such headers, but `Host`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from freestep.api.token_places import is_loopback
from freestep.errors import Forbidden
from freestep_service.access.audit import Deed
from freestep_service.settings import Settings
from freestep_service.web.browser_session import own_cookies
from freestep_service.web.context import ServiceContext
from freestep_service.web.problems import problem_response

__all__ = ["OPEN_PATH", "OwnHosts"]

OPEN_PATH = "/healthz"
"""Which orchestrators ask by whatever name they have for it, and which says nothing."""
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/@]+)(?::([0-9]{1,5}))?")
_DEFAULT_PORT = re.compile(rb":(80|443)$")
_READ = frozenset((b"host", b"origin", b"sec-fetch-site", b"cookie"))
_OWN_SITES = (b"same-origin", b"none")
"""none: its user has typed the address."""
_MOST_KNOWN = 256


class OwnHosts:
    """ASGI middleware. `observe` is called with the slug of each refusal."""

    def __init__(self, app: ASGIApp, settings: Settings, observe: Callable[[str], None]) -> None:
        self._app = app
        self._observe = observe
        names = {settings.host, urlsplit(settings.own_url()).hostname or "", socket.gethostname()}
        self._names = {name.lower() for name in names}
        self._patterns = settings.host_patterns()
        self._known: set[bytes] = set()
        """Values of `Host` that were found to be the service's own."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # No coroutine of its own around each request.
        if scope["type"] != "http":
            return self._app(scope, receive, send)
        found = {name: value for name, value in scope["headers"] if name in _READ}
        if b"cookie" in found:
            scope = {**scope, "headers": own_cookies(scope["headers"])}
        if scope["path"] != OPEN_PATH and (reason := self._objection(found)):
            self._observe(Forbidden.slug)
            peer = scope["client"] and scope["client"][0]
            deed = Deed(None, peer, "from another host or origin", None, Forbidden.slug)
            ServiceContext.of(Request(scope)).audit.note_stranger(deed)
            return problem_response(Forbidden(reason))(scope, receive, send)
        return self._app(scope, receive, send)

    def _objection(self, found: Mapping[bytes, bytes]) -> str | None:
        """What is wrong with where a request comes from, by the headers that say so."""
        host = found.get(b"host", b"")
        if host not in self._known:
            if not self._is_own(host.decode("latin-1")):
                return f"{_shown(host)} is no host of this service: name it in the setting allowed_hosts"
            if len(self._known) < _MOST_KNOWN:
                self._known.add(host)
        if len(found) == 1:
            return None
        if found.get(b"sec-fetch-site", b"none") not in _OWN_SITES:
            return "a page of another site has sent the request"
        origin = found.get(b"origin")
        if origin is not None and _place(origin.partition(b"://")[2]) != _place(host):
            return f"a page of {_shown(origin)} has sent the request"
        return None

    def _is_own(self, host: str) -> bool:
        if not host:
            # Of HTTP/1.0, which no browser speaks.
            return True
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].rstrip(".").strip("[]").lower()
        return (
            name in self._names
            or is_loopback(name)
            or _is_address(name)
            or any(fnmatchcase(name, pattern) for pattern in self._patterns)
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _place(netloc: bytes) -> bytes:
    """Host and port; a proxy may speak https to the browser and http to the service, with either's default port."""
    return _DEFAULT_PORT.sub(b"", netloc.lower())


def _shown(value: bytes) -> str:
    return repr(value[:300].decode("latin-1"))
