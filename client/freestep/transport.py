"""HTTP requests with retries; bodies of tensors are sent without copying them as a whole.

Requests are repeated after a lost connection, and after 408, 429, 502, 503 and 504, of the service or of a gateway
before it, when their Retry-After has passed; but not if the certificate of either side is not trusted. Every request
that is repeated is idempotent, a push by its idempotency key. A push to a paused run is repeated until the run is
resumed, however long that takes.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import httpx

from freestep.bulk_exchange import Body
from freestep.credentials import NO_CREDENTIALS, Credentials
from freestep.errors import (
    CoordinatorUnavailable,
    Forbidden,
    IssuerUnavailable,
    MalformedTensors,
    MemoryNotShared,
    Overloaded,
    ProblemError,
    RequestTimeout,
    RunNotFound,
    RunPaused,
    ServiceUnreachable,
    ShardUnavailable,
    Unauthenticated,
    UnexpectedResponse,
)
from freestep.leaving import PATIENCE_S, is_leaving
from freestep.outages import Outages, Waiter, cause_of
from freestep.responses import Answer, Destination, GatewayError, read
from freestep.service_url import unsendable, without_password
from freestep.shared_memory import Bodies, SharedMemories, SharedMemory
from freestep.threads import Threads
from freestep.wire.receiver import MEDIA_TYPE

__all__ = ["Route", "Transport"]

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 3.0
_PAUSED_S = 5.0
"""The most seconds until a push to a paused run is repeated, where the service does not say."""
_CONNECT_S = 3.0
"""Connection timeout for shard owners' URLs: these may be addresses that drop packets, such as a container's."""

_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
"""OpenSSL's reason in a ConnectError's text; such a request is not repeated."""
_NOT_ACCEPTED = re.compile("ALERT_(UNKNOWN_CA|[A-Z_]*CERTIFICATE[A-Z_]*)")
"""OpenSSL's reason in an error's text, where the server has refused this side's certificate: that may be noticed when
its first answer is read. Such a request is not repeated either."""

_LASTING_QUOTAS = ("runs", "parameters")
"""Quotas that stay used up until somebody deletes a run: an Overloaded that names one does not pass by waiting."""

_TRANSIENT = (
    CoordinatorUnavailable,
    IssuerUnavailable,
    Overloaded,
    RequestTimeout,
    ShardUnavailable,
    GatewayError,
    httpx.TransportError,
)
_MAY_BE_DONE = (CoordinatorUnavailable, GatewayError, httpx.TransportError)
"""Errors after which the service may have done what was asked, unless the request did not reach it."""
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)
_UNREACHABLE = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
    UnexpectedResponse,
    RunNotFound,
    Unauthenticated,
)
"""Errors by which a shard owner's URL shows that it cannot be reached from here, or leads to another server."""


@lru_cache(maxsize=1024)
def _address(url: str, *params: tuple[str, str | int]) -> httpx.URL:
    """A URL with its query, parsed once: httpx takes about 60 µs for it, at every step."""
    return httpx.URL(url).copy_merge_params(dict(params)) if params else httpx.URL(url)


class Route(Protocol):
    """The server that a request goes to, which may change between attempts."""

    def url(self) -> str:
        """The server's URL, empty for the service's own. Raises FreestepError to stop the request."""

    def failed(self, url: str, error: Exception) -> None:
        """Called after an attempt failed with a transient error."""

    def unreachable(self, url: str) -> None:
        """Called when the service cannot be reached at this URL; the next `url()` must be another."""


class Transport:
    """Requests to one service. Safe to use from several threads, as `httpx.Client` is.

    retry_for: seconds for which a request is repeated once it has failed. explain: is asked about errors before the
    service's first answer, and says why a repetition cannot help, if it can not. credentials: the token that requests
    carry. shares_memory: whether large bodies may go through memory that a service on this machine shares. clock,
    sleep: for tests.
    """

    def __init__(
        self,
        http: httpx.Client,
        retry_for: float,
        *,
        explain: Callable[[Exception], str | None] = lambda error: None,
        credentials: Credentials = NO_CREDENTIALS,
        shares_memory: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = http
        self._retry_for = retry_for
        self._explain = explain
        self._credentials = credentials
        self._clock = clock
        self._sleep = sleep
        self._outages = Outages(clock)
        self._has_answered = False
        self.threads = Threads()
        """For requests that are sent at the same time."""
        self.memories = SharedMemories(is_wanted=shares_memory)
        """In which large bodies may lie."""

    @property
    def base_url(self) -> httpx.URL:
        return self._http.base_url

    @property
    def has_token(self) -> bool:
        """Whether requests carry a token."""
        return self._credentials.token is not None

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | int] | None = None,
        body: Body | None = None,
        into: Destination | None = None,
        wait: float = 0.0,
        patience: float | None = None,
        retry: bool = True,
        route: Route | None = None,
        bodies: Bodies | None = None,
        done_if: type[ProblemError] | None = None,
    ) -> Answer:
        """Sends a request, and repeats it after transient errors.

        body: a safetensors body. into: where an answer's tensors are put; an answer may be a JSON document instead.
        wait: seconds for which the service may hold the answer. patience: the most seconds without progress after which
        an attempt fails, where that is sooner than the client's own. retry: False sends the request once. route: the
        server to ask, if it is not the service's own URL. bodies: what body and answer are, if they may lie in shared
        memory. done_if: what a repetition is refused with where an attempt before it, whose answer was lost, has done
        all that was asked; then that is the answer.

        Raises the ProblemError that the service named, ServiceUnreachable if nothing answered in time, and
        UnexpectedResponse if the answer is not freestep's.
        """

        def send_with(url: str, memory: SharedMemory | None) -> Answer:
            lines, sent = dict(headers or {}), body
            if memory is not None:
                lines |= memory.headers(None if body is None else body.pieces)
                sent = None if body is None else Body([])
            if sent is not None:
                lines |= {"Content-Type": MEDIA_TYPE, "Content-Length": str(sent.length)}
            response = self._send(
                method, url, path, json=json, headers=lines, params=params, body=sent, wait=wait, most=patience
            )
            try:
                return read(response, into, memory)
            finally:
                response.close()
                # httpx's answer refers to itself and to its request: a body would wait until garbage is collected.
                response.request.stream = httpx.ByteStream(b"")

        may_be_done = False

        def send(url: str) -> Answer:
            nonlocal may_be_done
            try:
                return attempt(url)
            except _MAY_BE_DONE as error:
                may_be_done |= not isinstance(error, _NOT_SENT)
                raise
            except ProblemError as error:
                if may_be_done and done_if is not None and isinstance(error, done_if):
                    return Answer(204, {})
                raise

        def attempt(url: str) -> Answer:
            place = url or str(self.base_url).rstrip("/")
            size = 0 if body is None else body.length
            memory = None
            try:
                with self.memories.lent(place, bodies, size, self._ask_for_memory) as memory:
                    return send_with(url, memory)
            except (MemoryNotShared, MalformedTensors):
                if memory is None:
                    raise
            return send_with(url, None)

        answer = self._with_retries(send, route, self._retry_for if retry else 0.0, path)
        self._outages.resumed(path)
        return answer

    def _ask_for_memory(self, url: str, path: str, wish: dict[str, Any]) -> Any:
        return self.request("POST", path, json=wish, retry=False, route=_Only(url)).document

    def open(
        self, path: str, *, headers: Mapping[str, str], params: Mapping[str, str | int], wait: float
    ) -> httpx.Response:
        """The successful answer to a GET, with its body unread, for as long as it goes on; the caller closes it.

        wait: seconds for which the service may send nothing of it. Raises as `request` does.
        """

        def send(url: str) -> httpx.Response:
            response = self._send("GET", url, path, headers=headers, params=params, wait=wait)
            if not response.is_success:
                try:
                    read(response, None)
                finally:
                    response.close()
            return response

        return self._with_retries(send, None, self._retry_for)

    def _send(
        self,
        method: str,
        url: str,
        path: str,
        *,
        headers: Mapping[str, str],
        params: Mapping[str, str | int] | None,
        wait: float,
        most: float | None = None,
        json: Any = None,
        body: Body | None = None,
    ) -> httpx.Response:
        """Sends a request once, as `request` has it; the answer, with its body unread.

        url: as of a Route. most: the request's patience.
        """
        patience = self._http.timeout.read or 30.0
        patience = patience if most is None else min(patience, most)
        if is_leaving():
            patience, wait = min(patience, PATIENCE_S), 0.0
        connect = min(patience, _CONNECT_S) if url else patience
        timeout = httpx.Timeout(patience, connect=connect, read=patience + wait)
        base = url or str(self.base_url).rstrip("/")
        # httpx would replace the address's query by the client's own default parameters.
        query = () if self._http.params else tuple((params or {}).items())
        try:
            request = self._http.build_request(
                method,
                _address(base + path, *query),
                json=json,
                headers={**headers, "Accept-Encoding": "identity"} | self._credentials.headers(),
                params=None if query else params,
                content=body,
                timeout=timeout,
            )
        except UnicodeEncodeError as error:
            raise unsendable(error) from None
        if body is not None:
            request.stream = body
        return self._http.send(request, stream=True)

    def _with_retries(self, send: Callable[[str], T], route: Route | None, seconds: float, path: str = "") -> T:
        """What a request was answered with. send: sends it once, to a URL as of a Route. path: as it is logged."""
        waiter = Waiter()
        try:
            return self._repeated(send, route, seconds, path, waiter)
        finally:
            self._outages.ended(waiter)

    def _repeated(self, send: Callable[[str], T], route: Route | None, seconds: float, path: str, waiter: Waiter) -> T:
        """As `_with_retries`."""

        def attempt(url: str) -> T:
            token = self._credentials.token
            try:
                return send(url)
            except (Unauthenticated, Forbidden):
                # Nothing was changed, and the token may have been replaced; another thread may have read it since.
                self._credentials.renew()
                if self._credentials.token in (None, token):
                    raise
                return send(url)

        # The first attempt takes as long as the service may hold its answer.
        deadline: float | None = None
        longest, paused = _FIRST_PAUSE_S, _FIRST_PAUSE_S / 2
        while True:
            url = route.url() if route is not None else ""
            place = without_password(url or str(self.base_url).rstrip("/"))
            try:
                answer = attempt(url)
            except httpx.LocalProtocolError as error:
                # What a proxy's transport quotes may be a token.
                cause = str(error).partition(" b'")[0]
                raise ServiceUnreachable(f"the request to {place} cannot be sent: {cause}") from None
            except _UNREACHABLE as error:
                if url and route is not None:
                    route.unreachable(url)
                    continue
                if isinstance(error, httpx.UnsupportedProtocol):
                    message = f"{place} is not a URL that can be requested: {error}"
                    raise ServiceUnreachable(message) from error
                if not isinstance(error, _TRANSIENT):
                    self._require_service(error)
                    raise
                failure: Exception = error
            except RunPaused as error:
                self._has_answered = True
                self._outages.answered(place, waiter)
                if not seconds or is_leaving():
                    raise
                self._outages.paused(path)
                # A pause that ends at once, as when a region's run is moved, costs no seconds.
                paused = min(2 * paused, error.retry_after or _PAUSED_S)
                self._sleep(random.uniform(0.5, 1.0) * paused)
                if is_leaving():
                    raise
                deadline, longest = None, _FIRST_PAUSE_S
                continue
            except _TRANSIENT as error:
                if isinstance(error, ProblemError) and error.extensions.get("quota") in _LASTING_QUOTAS:
                    raise
                failure = error
            except ProblemError:
                self._has_answered = True
                self._outages.answered(place, waiter)
                raise
            else:
                self._has_answered = True
                self._outages.answered(place, waiter)
                return answer
            if isinstance(failure, httpx.ConnectError) and _UNTRUSTED in str(failure):
                raise ServiceUnreachable(f"{place} is not trusted: {failure}") from failure
            if isinstance(failure, httpx.TransportError) and _NOT_ACCEPTED.search(str(failure)):
                raise ServiceUnreachable(f"{place} does not accept this client's certificate: {failure}") from failure
            self._require_service(failure)
            if route is not None:
                route.failed(url, failure)
            pause = random.uniform(longest / 2, longest) + (getattr(failure, "retry_after", None) or 0.0)
            now = self._clock()
            deadline = now + seconds if deadline is None else deadline
            left = deadline - now
            if pause <= left and not is_leaving():
                self._outages.failed(place, failure, left, waiter)
                self._sleep(pause)
                longest = min(2 * longest, _LONGEST_PAUSE_S)
                if not is_leaving():
                    continue
            if isinstance(failure, ProblemError):
                raise failure
            tried = f" for {seconds:g} s" if seconds and not is_leaving() else ""
            raise ServiceUnreachable(f"{place} did not answer{tried}: {cause_of(failure)}") from failure

    def _require_service(self, error: Exception) -> None:
        """Raises ServiceUnreachable if the error, the first thing that is heard of the service, will not pass."""
        if self._has_answered or isinstance(error, ProblemError):
            return
        if (reason := self._explain(error)) is not None:
            raise ServiceUnreachable(reason) from error

    def close(self) -> None:
        self._http.close()
        self.threads.close()
        self.memories.close()


class _Only:
    """The way to one URL, and to no other."""

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self) -> str:
        if not self._url:
            raise ServiceUnreachable("the service cannot be reached there")
        return self._url

    def failed(self, url: str, error: Exception) -> None:
        pass

    def unreachable(self, url: str) -> None:
        self._url = ""
