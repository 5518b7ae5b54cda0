"""Client: a connection to one freestep service."""

from __future__ import annotations

import os
import ssl
from types import TracebackType
from typing import Any, Self

import httpx

from freestep.answers import parse
from freestep.api.models import MOST_SHARDS, RunList, RunStatus
from freestep.bulk import BulkTransport
from freestep.errors import InvalidSetting
from freestep.proxies import EnvironmentTransport
from freestep.run import Run
from freestep.service_url import check_url, other_scheme
from freestep.transport import Transport
from freestep.worker_group import SINGLE_PROCESS, WorkerGroup

__all__ = ["DEFAULT_URL", "Client"]

DEFAULT_URL = "http://127.0.0.1:8000"

_RETRY_S = 60.0
_KEEPALIVE_S = 50.0
"""Less than the 60 s after which the service closes an idle connection."""


class Client:
    """A connection to one freestep service, with retries. Use it as a context manager, or call `close`.

    Requests are repeated while the service is away or busy, for `retry_for` seconds; a push then still counts once.
    Safe to use from several threads. Every call may raise a ProblemError, ServiceUnreachable or UnexpectedResponse.

    Example:
        >>> with freestep.Client("http://127.0.0.1:8000") as client:
        ...     print([status.run for status in client.runs()])

    Args:
        url: The service's URL; None takes FREESTEP_URL from the environment, or http://127.0.0.1:8000.
        token: A bearer token; None takes FREESTEP_TOKEN from the environment, if it is set.
        verify: The certificates that are trusted at https URLs: a file of CA certificates in PEM format, or an SSL
            context. True takes the file that FREESTEP_CA_CERTS names, or SSL_CERT_FILE or SSL_CERT_DIR, or certifi's CA
            certificates. False trusts every server, which can then read and change tokens and weights.
        timeout: Seconds without progress after which an attempt fails.
        retry_for: Seconds for which a request is repeated while the service is away or busy; 0 sends each request once.
            None takes FREESTEP_RETRY_SECONDS from the environment, or 60.
        http: An httpx client to use instead, for a proxy or hooks for example; url, token, verify and timeout are then
            ignored. It needs a connection for each shard of a run. It is fastest over a
            `freestep.bulk.BulkTransport`.

    Raises:
        InvalidSetting: The URL has no scheme or is none, the environment's proxy for it cannot be used, or `retry_for`
            is not a number of seconds.
        OSError: The file of CA certificates cannot be read.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        verify: ssl.SSLContext | str | os.PathLike[str] | bool = True,
        timeout: float = 30.0,
        retry_for: float | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        seconds = _retry_seconds(retry_for)
        if http is not None:
            self._transport = Transport(http, seconds)
            return
        address = httpx.URL(check_url(url or os.environ.get("FREESTEP_URL") or DEFAULT_URL))
        token = token or os.environ.get("FREESTEP_TOKEN")
        context = _ssl_context(verify)
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=MOST_SHARDS, keepalive_expiry=_KEEPALIVE_S
        )
        transport = EnvironmentTransport(
            BulkTransport(context, limits=limits),
            lambda proxy: httpx.HTTPTransport(verify=context, limits=limits, proxy=proxy),
        )
        if (proxy := transport.proxies.find(address)) is not None:
            # Raises now rather than at the first request, if there can be none.
            transport.transport(proxy)

        def explain(error: Exception) -> str | None:
            other = other_scheme(address, error) if proxy is None else None
            return other and f"the server at {address} speaks {httpx.URL(other).scheme}: use the URL {other}"

        http = _HttpClient(
            base_url=address,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout,
            transport=transport,
        )
        self._transport = Transport(http, seconds, explain=explain)

    def run(self, name: str, *, ranks: WorkerGroup = SINGLE_PROCESS) -> Run:
        """One run of the service, which need not exist yet; sends no request.

        Args:
            name: The run's name.
            ranks: The processes that are one worker together, each of which makes every `exchange` and `pull`.
        """
        return Run(self._transport, name, ranks)

    def runs(self) -> list[RunStatus]:
        """The status of every run."""
        return parse(RunList, self._transport.request("GET", "/v1/runs")).runs

    def close(self) -> None:
        """Closes the connections, and the httpx client that the client was given."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Cookies(httpx.Cookies):
    """Looks for cookies in answers that set some: httpx looks in every answer, which is a twentieth of a small push."""

    def extract_cookies(self, response: httpx.Response) -> None:
        if "set-cookie" in response.headers:
            super().extract_cookies(response)


class _HttpClient(httpx.Client):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._cookies = _Cookies()


def _retry_seconds(given: float | None) -> float:
    text = os.environ.get("FREESTEP_RETRY_SECONDS") if given is None else None
    name, value = ("FREESTEP_RETRY_SECONDS", text) if text else ("retry_for", _RETRY_S if given is None else given)
    try:
        seconds = float(value)
        if seconds >= 0:
            return seconds
    except (TypeError, ValueError):
        pass
    raise InvalidSetting(f"{name} must be a number of seconds, at least 0, not {value!r}")


def _ssl_context(verify: ssl.SSLContext | str | os.PathLike[str] | bool) -> ssl.SSLContext:
    if verify is True:
        verify = os.environ.get("FREESTEP_CA_CERTS") or True
    if isinstance(verify, ssl.SSLContext | bool):
        return httpx.create_ssl_context(verify=verify)
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        # The original error does not name the file.
        raise OSError(f"{os.fspath(verify)}: the CA certificates cannot be read: {error.strerror}") from error
