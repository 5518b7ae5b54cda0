"""A request that is let in has a host that others, too, read as one of the service's, and comes from its own pages."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from asgi_calls import Answer
from freestep_service.settings import Settings
from freestep_service.web.hosts import OwnHosts
from fuzz.target import Target, mutants

__all__ = ["TARGET"]

_OWN = {"train.example.org", "localhost", socket.gethostname().lower()}
_SETTINGS = Settings(advertise_url="http://train.example.org:8000", allowed_hosts="*.example.net", insecure=True)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})


_NOTED = SimpleNamespace(
    state=SimpleNamespace(context=SimpleNamespace(audit=SimpleNamespace(note_stranger=lambda deed: None)))
)


def _is_let_in(headers: list[tuple[bytes, bytes]]) -> bool:
    answer = Answer()
    scope = {"type": "http", "method": "GET", "path": "/v1/runs", "headers": headers, "client": None, "app": _NOTED}
    # A new one for each: it remembers hosts.
    call = OwnHosts(_app, _SETTINGS, lambda slug: None)(scope, None, answer.send)  # type: ignore[arg-type]
    asyncio.run(call)
    assert answer.status in (204, 403)
    return answer.status == 204


def _host_of(url: str) -> str | None:
    """The host that a browser would talk to, as Python reads a URL; None if it is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_own(name: str) -> bool:
    name = name.rstrip(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in _OWN or name.endswith((".localhost", ".example.net"))
    return True


def check(data: bytes) -> None:
    host, origin, site, *_ = [*data.split(b"\n"), b"", b"", b""]
    host = host.strip(b" \t")
    headers = [(b"host", host)]
    headers += [(b"origin", origin)] if origin else []
    headers += [(b"sec-fetch-site", site)] if site else []
    if not _is_let_in(headers) or not host:
        return
    name = _host_of("http://" + host.decode("latin-1"))
    assert name is not None and _is_own(name), host
    assert site in (b"", b"none", b"same-origin")
    if origin:
        assert _host_of("http://" + origin.partition(b"://")[2].decode("latin-1")) == name


_SEEDS = (
    b"train.example.org:8000",
    b"localhost:80\nhttp://localhost\nsame-origin",
    b"[::1]:8000\nhttp://[::1]:8000\nnone",
    b"127.0.0.1\nhttps://127.0.0.1:443",
    b"a.example.net\nhttp://a.example.net",
    b"attacker.example\nhttp://attacker.example\ncross-site",
)
_WORDS = (
    b"\n", b".", b":", b"[", b"]", b"/", b"@", b"?", b"#", b"%", b"*", b"\\", b";", b",", b" ", b"\x00", b"\xff",
    b"://", b"localhost", b"example.net", b"::1", b"127.0.0.1", b"0x7f.1", b"2130706433", b"null", b"same-site",
    b"\xad", b"%00",
)  # fmt: skip

TARGET = Target(check, _SEEDS, _WORDS, mutants(_SEEDS, _WORDS))
