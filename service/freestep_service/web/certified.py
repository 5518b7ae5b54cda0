"""Who has sent a request over a connection with a client certificate; and how processes tell each other who it was.

A certificate cannot be passed on as a token can: what proves it stays with the connection. So the process that has the
connection says whom it has let in, in a header that it signs together with the request that it relays.
"""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.types import Scope

from freestep_service.domain.certificates import token_of
from freestep_service.domain.tokens import Token
from freestep_service.settings import Settings
from freestep_service.web.connection import CONNECTION, Connection

__all__ = ["CALLER", "caller_line", "is_let_in_by_certificate", "let_in_by_certificate", "named_caller", "presented"]

CALLER = "freestep-caller"
"""The header of a relayed request whose sender has shown a certificate: until when it is good, in seconds since 1970,
and the token that the certificate counts as. The signature of `Freestep-Relayed` is of it too."""
_CERTIFIED = "freestep.certified"
"""Where the scope of an ASGI request has that token."""
_GOOD_S = 300
"""Seconds for which the header is good: time for a request to come, and for clocks to differ."""


def presented(scope: Scope, settings: Settings) -> Token | None:
    """What the certificate of a request's connection counts as; None without one."""
    connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    certificate = None if connection is None else connection.certificate
    if certificate is None:
        return None
    return token_of(certificate, settings.ssl_client_scope, settings.ssl_client_runs, settings.ssl_client_workers)


def let_in_by_certificate(scope: Scope, token: Token) -> None:
    """Notes what a request was let in with, for those that are made for it."""
    scope[_CERTIFIED] = token


def is_let_in_by_certificate(scope: Scope) -> bool:
    """Whether a request was let in with a certificate."""
    return _CERTIFIED in scope


def caller_line(request: Request) -> str | None:
    """The header of a request that is made for another one; None if that carries a token, which is passed on."""
    token: Token | None = request.scope.get(_CERTIFIED)
    return None if token is None else f"{int(time.time()) + _GOOD_S} {token.to_json()}"


def named_caller(line: str) -> Token | None:
    """The token that a header names, whose signature was verified; None if it is good no more."""
    until, _, text = line.partition(" ")
    return Token.from_json(text) if int(until) > time.time() else None
