"""`freestep doctor`: what a worker needs, checked one after another, with what to do about what is wrong."""

from __future__ import annotations

import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any

import httpx
import typer

from freestep.client import DEFAULT_URL
from freestep.commands.shared import WHERE_TOKENS_ARE_GIVEN, Token, Url
from freestep.errors import CoordinatorUnavailable, Forbidden, FreestepError, ServiceUnreachable, Unauthenticated
from freestep.proxies import Proxies
from freestep.responses import Answer
from freestep.service_transport import open_transport, retry_seconds, shares_memory, ssl_context
from freestep.service_url import check_url
from freestep.shared_memory import obstacle
from freestep.terminal import print_line
from freestep.transport import Transport

__all__ = ["doctor"]

_TIMEOUT_S = 5.0
_CLOCKS_S = 10.0
"""Seconds by which two clocks may differ."""
_DATE_AGE_S = 2.0
"""Seconds that a Date header is old at most when it is sent: it is cut to seconds, and kept for one."""
_MINOR = re.compile(r"([0-9]+)\.([0-9]+)")
"""A version's major and minor number."""
_CERTIFICATES = {
    "self-signed": "let FREESTEP_CA_CERTS name the file of the certificate",
    "self signed": "let FREESTEP_CA_CERTS name the file of the certificate",
    "unable to get local issuer": "let FREESTEP_CA_CERTS name the file of the CA that signed it",
    "mismatch": "use a host that the certificate names",
    "not valid for": "use a host that the certificate names",
    "expired": "give the service a new certificate",
    "not yet valid": "compare the clocks of both machines",
}
"""What to do about a certificate, by words of OpenSSL's reason."""
_TRUSTED = ("FREESTEP_CA_CERTS", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""Variables that name the CA certificates to trust, the first that is set; without any they are certifi's."""


class _Wrong(Exception):
    """What is wrong, and what to do."""


def doctor(url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Check URL, proxies, TLS, token, versions, Redis, device, shared memory and clocks, and say what to do."""
    if not _Examination(url, token).run():
        raise typer.Exit(1)


@dataclass
class _Examination:
    """The checks, a line for each. What depends on a check that failed is left out."""

    url: str
    token: str | None
    is_well: bool = True
    failed: set[str] = field(default_factory=set)

    def run(self) -> bool:
        """True if all is well."""
        self._check("retries", _retries)
        self._check("url", self._url)
        if "url" not in self.failed:
            self._check("trust", lambda: _trust(self.url))
        if self.failed & {"url", "trust"}:
            return False
        try:
            transport = open_transport(self.url, self.token, True, _TIMEOUT_S, 0.0)
        except Exception as error:
            self._say("settings", str(error) or type(error).__name__, is_well=False)
            return False
        try:
            self._ask(transport)
        finally:
            transport.close()
        return self.is_well

    def _ask(self, transport: Transport) -> None:
        answers: list[Answer] = []
        asked = time.time()
        self._check("service", lambda: _service(transport, answers))
        if not answers:
            return
        headers, answered = answers[0].headers, time.time()
        if self.url.startswith("https") and Proxies().find(httpx.URL(self.url)) is None:
            self._check("tls", lambda: _certificate(httpx.URL(self.url)))
        self._check("version", lambda: _version(answers[0].document))
        self._check("clock", lambda: _clock(headers, asked, answered))
        self._check("token", lambda: _token(transport))
        self._check("redis", lambda: _redis(transport, answers))
        if len(answers) > 1:
            self._check("device", lambda: f"the service computes on {answers[1].document['device']}")
            self._check("memory", lambda: _memory(self.url, answers[1].document.get("shared_memory")))
            self._check("runs", lambda: _runs(answers[1].document.get("problems") or {}))

    def _url(self) -> str:
        check_url(self.url)
        proxy = Proxies().find(httpx.URL(self.url))
        if proxy is None:
            return f"{self.url}, asked directly"
        proxy.parsed()
        return f"{self.url}, through {proxy}"

    def _check(self, name: str, check: Callable[[], str]) -> None:
        try:
            self._say(name, check(), is_well=True)
        except Exception as error:
            self.failed.add(name)
            said = isinstance(error, _Wrong | FreestepError | OSError)
            self._say(name, str(error) if said and str(error) else f"{type(error).__name__}: {error}", is_well=False)

    def _say(self, name: str, text: str, *, is_well: bool) -> None:
        self.is_well &= is_well
        print_line(f"{'ok' if is_well else 'wrong':<7}{name:<9}{text}")


def _retries() -> str:
    seconds = retry_seconds(None)
    return f"workers repeat requests for {seconds:g} s (FREESTEP_RETRY_SECONDS)"


def _trust(url: str) -> str:
    if not url.startswith("https"):
        return "no certificates are needed for http"
    count = ssl_context(True).cert_store_stats()["x509_ca"]
    return f"{count} CA certificates are trusted, those of {next(filter(os.environ.get, _TRUSTED), 'certifi')}"


def _service(transport: Transport, answers: list[Answer]) -> str:
    try:
        answers.append(transport.request("GET", "/healthz", retry=False))
    except ServiceUnreachable as error:
        text = str(error)
        for words, advice in _CERTIFICATES.items():
            if "is not trusted" in text and words in text:
                raise _Wrong(f"{text}: {advice}") from error
        if "speaks" in text or "is not trusted" in text:
            raise
        raise _Wrong(f"{text}: see that `freestep serve` runs there, and that no firewall is between") from error
    if not isinstance(answers[0].document, dict) or answers[0].document.get("status") != "ok":
        answers.clear()
        raise _Wrong("another server is at this URL: see --url or FREESTEP_URL")
    return "answers"


def _certificate(url: httpx.URL) -> str:
    with _connected(url) as connection:
        certificate: Mapping[str, Any] = connection.getpeercert() or {}
        ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]))
        return f"{connection.version()}, with a certificate that is trusted until {ends:%Y-%m-%d %H:%M}"


@contextmanager
def _connected(url: httpx.URL) -> Iterator[ssl.SSLSocket]:
    with socket.create_connection((url.host, url.port or 443), _TIMEOUT_S) as plain:
        with ssl_context(True).wrap_socket(plain, server_hostname=url.host) as wrapped:
            yield wrapped


def _version(document: Mapping[str, Any]) -> str:
    own, other = version("freestep"), document.get("version")
    if other is None:
        raise _Wrong(f"the service does not say its version, and is older than this one, {own}: update it")
    if other == own:
        return f"freestep {own}, here and there"
    if not _are_neighbours(own, str(other)):
        raise _Wrong(f"the service is freestep {other} and this is {own}: install the same on both")
    return f"freestep {own} here and {other} there, which work together"


def _are_neighbours(own: str, other: str) -> bool:
    """Whether two versions are at most one minor version apart."""
    here, there = _MINOR.match(own), _MINOR.match(other)
    return bool(here and there and here[1] == there[1] and abs(int(here[2]) - int(there[2])) <= 1)


def _clock(headers: Mapping[str, str], asked: float, answered: float) -> str:
    if "date" not in headers:
        return "the service does not say its time"
    date = parsedate_to_datetime(headers["date"]).timestamp()
    # By how much this clock is ahead: the date was given between the two moments.
    least, most = asked - (date + _DATE_AGE_S), answered - date
    if least > _CLOCKS_S or most < -_CLOCKS_S:
        order, difference = ("ahead of", least) if least > 0 else ("behind", -most)
        raise _Wrong(f"this clock is {difference:.0f} s {order} the service's: set both, by NTP for example")
    return f"within {_CLOCKS_S:.0f} s of the service's"


def _token(transport: Transport) -> str:
    try:
        transport.request("GET", "/v1/runs", retry=False)
    except CoordinatorUnavailable:
        # That is another check's.
        return "not refused"
    except Unauthenticated as error:
        raise _Wrong(f"{error}: {WHERE_TOKENS_ARE_GIVEN}") from error
    except Forbidden as error:
        raise _Wrong(f"{error}: see the service's settings") from error
    if transport.has_token:
        return "accepted"
    certificate = os.environ.get("FREESTEP_CLIENT_CERT")
    return f"none is needed with the certificate {certificate}" if certificate else "none is needed"


def _redis(transport: Transport, answers: list[Answer]) -> str:
    try:
        answers.append(transport.request("GET", "/readyz", retry=False))
    except CoordinatorUnavailable as error:
        raise _Wrong(f"{error}: see that the service's Redis runs, and its setting redis_url") from error
    return "answers the service"


def _memory(url: str, name: str | None) -> str:
    why_not = obstacle(url, name) if shares_memory(None) else "FREESTEP_SHARED_MEMORY turns memory off"
    return f"bodies go over connections: {why_not}" if why_not else "large bodies can go through memory that is shared"


def _runs(problems: Mapping[str, Any]) -> str:
    if problems:
        listed = "; ".join(f"{run}: {reason}" for run, reason in problems.items())
        raise _Wrong(f"{listed}: the service's log has more")
    return "no run has a problem"
