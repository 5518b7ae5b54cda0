"""Client: a connection to one freestep service."""

from __future__ import annotations

import os
import ssl
from types import TracebackType
from typing import Self

import httpx

from freestep.answers import parse
from freestep.api.models import RunList, RunStatus
from freestep.api.token_form import Scope
from freestep.api.tokens import NewToken, SignInLink, TokenList, TokenStatus
from freestep.credentials import own_credentials
from freestep.errors import TokenNotFound
from freestep.lease import release_leases
from freestep.run import Run
from freestep.service_transport import open_transport, retry_seconds, shares_memory
from freestep.service_url import in_path
from freestep.transport import Transport
from freestep.worker_group import SINGLE_PROCESS, WorkerGroup

__all__ = ["DEFAULT_URL", "Client"]

DEFAULT_URL = "http://127.0.0.1:8000"


class Client:
    """A connection to one freestep service, with retries. Use it as a context manager, or call `close`.

    Requests are repeated while the service is away or busy, for `retry_for` seconds; a push then still counts once.
    Safe to use from several threads. Every call may raise a ProblemError, ServiceUnreachable or UnexpectedResponse.

    Example:
        >>> with freestep.Client("http://127.0.0.1:8000") as client:
        ...     print([status.run for status in client.runs()])

    Args:
        url: The service's URL; None takes FREESTEP_URL from the environment, or http://127.0.0.1:8000.
        token: A bearer token; None takes FREESTEP_TOKEN from the environment, or the content of the file that
            FREESTEP_TOKEN_FILE names, which is read again when it changes, or the admin token that a service of the
            same user on this machine has left for its clients.
        verify: The certificates that are trusted at https URLs: a file of CA certificates in PEM format, or an SSL
            context. True takes the file that FREESTEP_CA_CERTS names, or SSL_CERT_FILE or SSL_CERT_DIR, or certifi's CA
            certificates. False trusts every server, which can then read and change tokens and weights. Unless it is a
            context, the client shows the certificate that FREESTEP_CLIENT_CERT names, with the key of
            FREESTEP_CLIENT_KEY, to services that ask for one; the files are read again when they change.
        timeout: Seconds without progress after which an attempt fails.
        retry_for: Seconds for which a request is repeated while the service is away or busy; 0 sends each request once.
            None takes FREESTEP_RETRY_SECONDS from the environment, or 60.
        shared_memory: Whether large bodies of pushes and pulls go through memory that a service of the same user on
            this machine shares, and not through its connections. None takes FREESTEP_SHARED_MEMORY from the
            environment, or True; with `http` it is False, since what that client does to bodies, such as repeating or
            signing them, it does not do to those in memory.
        http: An httpx client to use instead, for a proxy or hooks for example; url, verify and timeout are then
            ignored, and so is the token if it has an Authorization header. It needs a connection for each shard of a
            run. It is fastest over a `freestep.bulk.BulkTransport`.

    Raises:
        InvalidSetting: The URL has no scheme or is none, the token cannot be one, the environment's proxy for the URL
            cannot be used, the environment's certificate is none, `retry_for` is not a number of seconds, or
            FREESTEP_SHARED_MEMORY is neither true nor false.
        OSError: A file of certificates cannot be read.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        verify: ssl.SSLContext | str | os.PathLike[str] | bool = True,
        timeout: float = 30.0,
        retry_for: float | None = None,
        shared_memory: bool | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        seconds, shares = retry_seconds(retry_for), shares_memory(shared_memory)
        if http is None:
            place = url or os.environ.get("FREESTEP_URL") or DEFAULT_URL
            self._transport = open_transport(place, token, verify, timeout, seconds, shared_memory=shares)
        else:
            self._transport = Transport(
                http, seconds, credentials=own_credentials(http, token), shares_memory=bool(shared_memory)
            )

    def run(self, name: str, *, ranks: WorkerGroup = SINGLE_PROCESS) -> Run:
        """One run of the service, which need not exist yet; sends no request.

        Args:
            name: The run's name.
            ranks: The processes that are one worker together, each of which makes every `exchange` and `pull`.

        Raises:
            MalformedRequest: The name is empty, or has a '/'.
        """
        return Run(self._transport, name, ranks)

    def runs(self) -> list[RunStatus]:
        """The status of every run, by name."""
        found: list[RunStatus] = []
        after: str | None = ""
        while after is not None:
            params = {"after": after} if after else None
            page = parse(RunList, self._transport.request("GET", "/v1/runs", params=params))
            found += page.runs
            after = page.next
        return found

    def create_token(
        self,
        name: str,
        scope: Scope,
        *,
        runs: str = "*",
        workers: str | None = None,
        expires_in: int | None = None,
        max_runs: int | None = None,
        max_parameters: int | None = None,
        max_leases: int | None = None,
        max_bytes_per_minute: int | None = None,
    ) -> NewToken:
        """Makes a token for somebody else; `NewToken.token` is the only place where it is shown.

        Args:
            name: What it is for.
            scope: `read` is to look at runs and report metrics, `push` also to create and train them, `admin` all.
            runs: A pattern of the runs that it is for, as in shells: `mnist-*`.
            workers: A pattern of the names under which its bearer may take leases; None is any.
            expires_in: Seconds after which it ends; None is never.
            max_runs: How many runs that it has created there may be at once; None takes the service's default.
            max_parameters: How many elements their parameters may have in all; None takes the service's default.
            max_leases: How many live leases it may have; None takes the service's default.
            max_bytes_per_minute: How many bytes of tensors it may send and receive in a minute, at each process of the
                service; None takes the service's default.
        """
        document = {"name": name, "scope": scope, "runs": runs, "workers": workers, "expires_in": expires_in}
        quota = {
            "max_runs": max_runs,
            "max_parameters": max_parameters,
            "max_leases": max_leases,
            "max_bytes_per_minute": max_bytes_per_minute,
        }
        # Services of older versions know none.
        document |= {bound: most for bound, most in quota.items() if most is not None}
        # Not repeated: a token whose answer was lost would stay, and nobody would know it.
        return parse(NewToken, self._transport.request("POST", "/v1/tokens", json=document, retry=False))

    def tokens(self) -> list[TokenStatus]:
        """The tokens that are good, without their texts."""
        return parse(TokenList, self._transport.request("GET", "/v1/tokens")).tokens

    def revoke_token(self, id: str) -> None:
        """Ends a token, at all processes of the service.

        Args:
            id: The token's ID, from `tokens` or `create_token`.

        Raises:
            TokenNotFound: There is no token of this ID that is good.
        """
        self._transport.request("DELETE", f"/v1/tokens/{in_path(id)}", done_if=TokenNotFound)

    def dashboard_link(self, run: str | None = None) -> str:
        """The address of the service's dashboard, which signs a browser in with this client's token: once, for minutes.

        Args:
            run: The run whose page it leads to; None is that of all runs.

        Raises:
            Forbidden: The client is known by a certificate, which the browser has to show itself.
        """
        # Not repeated: of a link whose answer was lost nobody would know.
        link = parse(SignInLink, self._transport.request("POST", "/dashboard/links", retry=False))
        page = "" if run is None else f"/runs/{in_path(run)}"
        fragment = page if link.code is None else f"sign-in={link.code}{page and '&to='}{page}"
        return f"{str(self._transport.base_url).rstrip('/')}/" + (fragment and f"#{fragment}")

    def close(self) -> None:
        """Releases the leases that were taken through it and are held, and closes the connections, and the httpx client
        that it was given."""
        release_leases(self._transport)
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
