"""Certificates of clients, which a CA of the service's choice has signed: what they allow, as tokens do."""

from __future__ import annotations

import glob
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

from freestep.api.token_form import Scope
from freestep_service.domain.tokens import Token, digest_of

__all__ = ["Certificate", "token_of"]


@dataclass(frozen=True)
class Certificate:
    """A client's certificate. name: its common name, or its first alternative one; expires_at: seconds since 1970."""

    name: str
    expires_at: int

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """The certificate of a verified peer, as `ssl.SSLSocket.getpeercert` gives it."""
        named = [value for part in fields["subject"] for key, value in part if key == "commonName"]
        named += [value for _, value in fields.get("subjectAltName", ()) if isinstance(value, str)]
        return cls((named or [fields["serialNumber"]])[0], int(ssl.cert_time_to_seconds(fields["notAfter"])))


@lru_cache(maxsize=4096)
def token_of(certificate: Certificate, scope: Scope, runs: str, workers: str | None) -> Token:
    """The token that a certificate counts as; {name} in `workers` is the certificate's, where it is no pattern.

    Its ID is the name's: that of the certificate which replaces it is the same.
    """
    name = f"certificate {certificate.name}"
    bound = workers and workers.replace("{name}", glob.escape(certificate.name))
    return Token(name, scope, digest_of(name), 0, runs, bound, certificate.expires_at)
