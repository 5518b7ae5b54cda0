"""HTTP with retries, and bodies of tensors without whole copies of them.

A request is made again after a lost connection, though not where the server's certificate is not trusted, and after
429 and 503 as long as the service asks: every request that freestep retries is safe to repeat, pushes because they
carry an idempotency key.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import httpx

from freestep.bulk import Body, pour
from freestep.errors import (
    CoordinatorUnavailable,
    MalformedTensors,
    Overloaded,
    ProblemError,
    RunNotFound,
    ServiceUnreachable,
    ShardUnavailable,
    Unauthenticated,
    UnexpectedResponse,
)
from freestep.wire.receiver import MEDIA_TYPE, Receiver

__all__ = ["Answer", "Place", "Transport", "in_background"]

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 3.0
_CONNECT_S = 3.0
"""A place other than the service's own URL may be one that drops packets: a container's address, seen from outside."""
_MOST_THREADS = 1 << 16
"""No limit: requests that wait for each other must all be made, and idle threads are used again."""

_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
"""OpenSSL's reason, which a transport's ConnectError repeats. The certificate is the same the next time."""

_PASSING = (CoordinatorUnavailable, Overloaded, ShardUnavailable, httpx.TransportError)
_ASTRAY = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
    UnexpectedResponse,
    RunNotFound,
    Unauthenticated,
)
"""What a place answers that cannot be reached from here, or that is another server as seen from here."""


@lru_cache(maxsize=1024)
def _address(url: str, *params: tuple[str, str | int]) -> httpx.URL:
    """A URL with its query; most are asked at every step."""
    return httpx.URL(url).copy_merge_params(dict(params)) if params else httpx.URL(url)


class _Destination(Protocol):
    def receiver(self, length: int) -> Receiver:
        """Where a body of `length` bytes goes."""

    def decode(self, receiver: Receiver) -> None:
        """Makes of a body that has arrived what is wanted of it."""


@dataclass(frozen=True)
class Answer:
    """An answer's status, headers by their names in lower case, and JSON document where it has one."""

    status: int
    headers: Mapping[str, str]
    document: Any = None


class Place(Protocol):
    """Where a request goes, which may be elsewhere at every attempt."""

    def url(self) -> str:
        """What stands before the path: a URL, or nothing for the service's own. May raise to give the request up."""

    def failed(self, url: str, error: Exception) -> None:
        """Takes note that an attempt there failed in a way that may pass."""

    def astray(self, url: str) -> None:
        """Takes note that the service is not to be found there, so that `url` says something else next."""


class Transport:
    """Requests to one service. Safe to use from several threads, as `httpx.Client` is."""

    def __init__(self, http: httpx.Client, retry_for: float) -> None:
        self._http = http
        self._retry_for = retry_for
        self._pool: ThreadPoolExecutor | None = None
        self._making = threading.Lock()

    @property
    def base_url(self) -> httpx.URL:
        return self._http.base_url

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | int] | None = None,
        body: Body | None = None,
        into: _Destination | None = None,
        wait: float = 0.0,
        retry: bool = True,
        place: Place | None = None,
    ) -> Answer:
        """One exchange, retried.

        body: a safetensors body, sent as it lies. into: where an answer's tensors go. wait: seconds for
        which the service may hold the answer. place: where to ask, instead of the service's own URL.

        Raises the ProblemError that the service named, ServiceUnreachable when nothing answered in time, and
        UnexpectedResponse when what answered is not freestep.
        """
        lines = {**(headers or {}), "Accept-Encoding": "identity"}
        if body is not None:
            lines |= {"Content-Type": MEDIA_TYPE, "Content-Length": str(body.length)}
        patience = self._http.timeout.read or 30.0

        def attempt(url: str) -> Answer:
            connect = min(patience, _CONNECT_S) if url else patience
            timeout = httpx.Timeout(patience, connect=connect, read=patience + wait)
            base = url or str(self.base_url).rstrip("/")
            # httpx would put a client's own parameters in the place of an address's.
            query = () if self._http.params else tuple((params or {}).items())
            request = self._http.build_request(
                method,
                _address(base + path, *query),
                json=json,
                headers=lines,
                params=None if query else params,
                content=body,
                timeout=timeout,
            )
            if body is not None:
                request.stream = body
            response = self._http.send(request, stream=True)
            try:
                return _read(response, into)
            finally:
                response.close()

        return self._retried(attempt, place, self._retry_for if retry else 0.0)

    def _retried(self, attempt: Callable[[str], Answer], place: Place | None, seconds: float) -> Answer:
        deadline = time.monotonic() + seconds
        longest = _FIRST_PAUSE_S
        while True:
            url = place.url() if place is not None else ""
            try:
                return attempt(url)
            except _ASTRAY as error:
                if url and place is not None:
                    place.astray(url)
                    continue
                if isinstance(error, httpx.UnsupportedProtocol):
                    message = f"{self._http.base_url} is not a URL that can be asked: {error}"
                    raise ServiceUnreachable(message) from error
                if not isinstance(error, _PASSING):
                    raise
                failure: Exception = error
            except _PASSING as error:
                failure = error
            if isinstance(failure, httpx.ConnectError) and _UNTRUSTED in str(failure):
                raise ServiceUnreachable(f"{self._http.base_url} is not trusted: {failure}") from failure
            if place is not None:
                place.failed(url, failure)
            pause = random.uniform(longest / 2, longest) + (getattr(failure, "retry_after", None) or 0.0)
            if time.monotonic() + pause > deadline:
                if isinstance(failure, ProblemError):
                    raise failure
                asked = f" for {seconds:g} s" if seconds else ""
                raise ServiceUnreachable(f"{url or self._http.base_url} did not answer{asked}: {failure}") from failure
            time.sleep(pause)
            longest = min(2 * longest, _LONGEST_PAUSE_S)

    def at_once(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Does all works at the same time, on threads of their own, and returns when the last one has ended."""
        with self._making:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="freestep-shard")
            futures = [self._pool.submit(work) for work in works]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        self._http.close()
        if self._pool is not None:
            # An interrupted call's requests may still wait for their answers; nobody waits for them.
            self._pool.shutdown(wait=False)


def in_background(work: Callable[[], T]) -> Future[T]:
    """Does a work on a thread of its own, for which a process that ends does not wait."""
    future: Future[T] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=do, name="freestep-push", daemon=True).start()
    return future


def _read(response: httpx.Response, into: _Destination | None) -> Answer:
    # Once: httpx reads all of them for each one that it is asked for.
    headers = dict(response.headers.items())
    if into is not None and headers.get("content-type") == MEDIA_TYPE and response.is_success:
        _receive(response, headers, into)
        return Answer(response.status_code, headers)
    response.read()
    document = _document(response)
    if not response.is_success:
        problem = ProblemError.from_document(document) if isinstance(document, dict) else None
        if problem is None:
            raise UnexpectedResponse(f"{response.request.url} answered {response.status_code}: {response.text[:200]!r}")
        if (seconds := headers.get("retry-after", "")).isdecimal():
            problem.retry_after = float(seconds)
        raise problem
    return Answer(response.status_code, headers, document)


def _receive(response: httpx.Response, headers: Mapping[str, str], into: _Destination) -> None:
    """What comes from the socket goes to its place in the flat vector."""
    try:
        receiver = into.receiver(int(headers["content-length"]))
        pour(response, receiver)
    except (MalformedTensors, KeyError, ValueError) as error:
        raise UnexpectedResponse(f"{response.request.url} did not answer with the run's tensors: {error}") from error
    if not receiver.complete:
        raise httpx.RemoteProtocolError("the body ended before its Content-Length", request=response.request)
    into.decode(receiver)


def _document(response: httpx.Response) -> Any:
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError:
        if not response.is_success:
            return None
        raise UnexpectedResponse(f"{response.request.url} did not answer with JSON") from None
