"""Makes the transport to a service, of its URL, a token, the certificates that are trusted, and the environment."""

from __future__ import annotations

import os
import ssl
from typing import Any

import httpx

from freestep.api.models import MOST_SHARDS
from freestep.bulk import BulkTransport
from freestep.bulk_exchange import Body
from freestep.client_certificate import is_open_without, shows_certificate, with_certificate
from freestep.credentials import credentials
from freestep.errors import InvalidSetting
from freestep.proxies import EnvironmentTransport
from freestep.service_url import check_url, other_scheme
from freestep.transport import Transport

__all__ = ["Verify", "open_transport", "retry_seconds", "shares_memory", "ssl_context"]

Verify = ssl.SSLContext | str | os.PathLike[str] | bool
"""The certificates that are trusted, as for `Client`."""

_RETRY_S = 60.0
_SWITCHES = {word: on for on, words in ((True, "1 true yes on"), (False, "0 false no off")) for word in words.split()}
"""What a switch of the environment may say; the service takes the same words."""
_KEEPALIVE_S = 50.0
"""Less than the 60 s after which the service closes an idle connection."""


def open_transport(
    url: str, token: str | None, verify: Verify, timeout: float, seconds: float, *, shared_memory: bool = True
) -> Transport:
    """The transport to a service.

    Args:
        url: The service's URL.
        token: A bearer token; None takes that of the environment, or finds it: see `Client`.
        verify: As for `Client`.
        timeout: Seconds without progress after which an attempt fails.
        seconds: Seconds for which requests are repeated.
        shared_memory: Whether large bodies may go through memory that a service on this machine shares.

    Raises:
        InvalidSetting: The URL, the token, the environment's certificate or its proxy cannot be used.
        OSError: A file of certificates cannot be read.
    """
    address = httpx.URL(check_url(url))
    bearer = credentials(token, address)
    context = ssl_context(verify)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=MOST_SHARDS, keepalive_expiry=_KEEPALIVE_S)
    transport = EnvironmentTransport(
        BulkTransport(context, limits=limits),
        lambda proxy: httpx.HTTPTransport(verify=context, limits=limits, proxy=proxy),
    )
    if (proxy := transport.proxies.find(address)) is not None:
        # Raises now rather than at the first request, if there can be none.
        transport.transport(proxy)

    def explain(error: Exception) -> str | None:
        if proxy is not None:
            return None
        if (other := other_scheme(address, error)) is not None:
            return f"the server at {address} speaks {httpx.URL(other).scheme}: use the URL {other}"
        if shows_certificate(context) and is_open_without(address, error, _trusting(verify)):
            return f"the service at {address} does not accept the certificate of FREESTEP_CLIENT_CERT"
        return None

    http = _HttpClient(
        base_url=address,
        timeout=timeout,
        transport=transport,
    )
    return Transport(http, seconds, explain=explain, credentials=bearer, shares_memory=shared_memory)


def retry_seconds(given: float | None) -> float:
    """Seconds for which requests are repeated: as given, or as FREESTEP_RETRY_SECONDS says, or 60.

    Raises InvalidSetting, which names the argument or the variable.
    """
    text = os.environ.get("FREESTEP_RETRY_SECONDS") if given is None else None
    name, value = ("FREESTEP_RETRY_SECONDS", text) if text else ("retry_for", _RETRY_S if given is None else given)
    try:
        seconds = float(value)
        if seconds >= 0:
            return seconds
    except (TypeError, ValueError):
        pass
    raise InvalidSetting(f"{name} must be a number of seconds, at least 0, not {value!r}")


def shares_memory(given: bool | None) -> bool:
    """Whether large bodies may go through shared memory: as given, or as FREESTEP_SHARED_MEMORY says, or True.

    Raises InvalidSetting, which names the variable.
    """
    text = os.environ.get("FREESTEP_SHARED_MEMORY", "").lower() if given is None else ""
    if not text:
        return given is not False
    if text not in _SWITCHES:
        raise InvalidSetting(f"FREESTEP_SHARED_MEMORY must be true or false, not {text!r}")
    return _SWITCHES[text]


def ssl_context(verify: Verify) -> ssl.SSLContext:
    """The certificates that are trusted, and the environment's own to show, unless a context says both.

    Raises OSError, which names the file, if they cannot be read, and InvalidSetting as `with_certificate` does.
    """
    return verify if isinstance(verify, ssl.SSLContext) else with_certificate(_trusting(verify))


def _trusting(verify: Verify | os.PathLike[str] | bool) -> ssl.SSLContext:
    if verify is True:
        verify = os.environ.get("FREESTEP_CA_CERTS") or True
    if isinstance(verify, ssl.SSLContext | bool):
        return httpx.create_ssl_context(verify=verify)
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        # The original error does not name the file.
        raise OSError(f"{os.fspath(verify)}: the CA certificates cannot be read: {error.strerror}") from error


class _Cookies(httpx.Cookies):
    """Looks for cookies in answers that set some: httpx looks in every answer, which is a twentieth of a small push."""

    def extract_cookies(self, response: httpx.Response) -> None:
        if "set-cookie" in response.headers:
            super().extract_cookies(response)


class _HttpClient(httpx.Client):
    """Makes requests of bodies from memory by itself: httpx takes a tenth of a millisecond to merge headers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._cookies = _Cookies()

    def build_request(self, method: str, url: Any, *, content: Any = None, headers: Any = None, **others: Any) -> Any:
        timeout = others.get("timeout")
        if not isinstance(content, Body) or not isinstance(timeout, httpx.Timeout) or len(self.cookies.jar):
            return super().build_request(method, url, content=content, headers=headers, **others)
        given = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        names = {name.lower() for name, _ in given}
        own = [header for header in self.headers.raw if header[0].lower() not in names]
        return httpx.Request(
            method,
            url,
            headers=[(b"Host", url.netloc), *own, *given],
            stream=content,
            extensions={"timeout": timeout.as_dict()},
        )
