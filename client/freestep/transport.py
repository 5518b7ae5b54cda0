"""HTTP with retries, and bodies of tensors without whole copies of them.

A request is made again after a lost connection, and after 429 and 503 as long as the service asks: every request
that freestep retries is safe to repeat, pushes because they carry an idempotency key.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from freestep.errors import (
    CoordinatorUnavailable,
    MalformedTensors,
    Overloaded,
    ProblemError,
    ServiceUnreachable,
    UnexpectedResponse,
)
from freestep.wire import MEDIA_TYPE, Receiver

__all__ = ["Answer", "Transport"]

_CHUNK = 256 * 1024
"""Bytes handed to httpx at a time: its socket write copies what is left of a piece after every partial write."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 3.0


class _Destination(Protocol):
    def receiver(self, length: int) -> Receiver: ...


@dataclass(frozen=True)
class Answer:
    """An answer's status, headers, and JSON document where it has one."""

    status: int
    headers: httpx.Headers
    document: Any = None


class Transport:
    """Requests to one service. Safe to use from several threads, as `httpx.Client` is."""

    def __init__(self, http: httpx.Client, retry_for: float) -> None:
        self._http = http
        self._retry_for = retry_for

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | int] | None = None,
        body: Sequence[memoryview] | None = None,
        into: _Destination | None = None,
        wait: float = 0.0,
        retry: bool = True,
    ) -> Answer:
        """One exchange, retried.

        body: a safetensors body in pieces, sent as it lies. into: where an answer's tensors go. wait: seconds for
        which the service may hold the answer.

        Raises the ProblemError that the service named, ServiceUnreachable when nothing answered in time, and
        UnexpectedResponse when what answered is not freestep.
        """
        lines = {**(headers or {}), "Accept-Encoding": "identity"}
        if body is not None:
            lines |= {"Content-Type": MEDIA_TYPE, "Content-Length": str(sum(map(len, body)))}
        timeout = httpx.Timeout(self._http.timeout.read or 30.0, read=(self._http.timeout.read or 30.0) + wait)

        def attempt() -> Answer:
            content = None if body is None else _pieces(body)
            with self._http.stream(
                method, path, json=json, headers=lines, params=params, content=content, timeout=timeout
            ) as response:
                return _read(response, into)

        return self._retried(attempt) if retry else attempt()

    def _retried(self, attempt: Callable[[], Answer]) -> Answer:
        deadline = time.monotonic() + self._retry_for
        longest = _FIRST_PAUSE_S
        while True:
            try:
                return attempt()
            except (CoordinatorUnavailable, Overloaded) as error:
                failure: Exception = error
            except httpx.UnsupportedProtocol as error:
                raise ServiceUnreachable(f"{self._http.base_url} is not a URL that can be asked: {error}") from error
            except httpx.TransportError as error:
                failure = error
            pause = random.uniform(longest / 2, longest) + (getattr(failure, "retry_after", None) or 0.0)
            if time.monotonic() + pause > deadline:
                if isinstance(failure, ProblemError):
                    raise failure
                raise ServiceUnreachable(
                    f"{self._http.base_url} did not answer for {self._retry_for:g} s: {failure}"
                ) from failure
            time.sleep(pause)
            longest = min(2 * longest, _LONGEST_PAUSE_S)

    def close(self) -> None:
        self._http.close()


def _pieces(body: Sequence[memoryview]) -> Iterator[bytes]:
    for part in body:
        for begin in range(0, len(part), _CHUNK):
            # A memoryview is what h11 and the socket are content with; the annotation is httpx's.
            yield part[begin : begin + _CHUNK]  # type: ignore[misc]


def _read(response: httpx.Response, into: _Destination | None) -> Answer:
    if into is not None and response.headers.get("content-type") == MEDIA_TYPE and response.is_success:
        _receive(response, into)
        return Answer(response.status_code, response.headers)
    response.read()
    document = _document(response)
    if not response.is_success:
        problem = ProblemError.from_document(document) if isinstance(document, dict) else None
        if problem is None:
            raise UnexpectedResponse(f"{response.request.url} answered {response.status_code}: {response.text[:200]!r}")
        if (seconds := response.headers.get("retry-after", "")).isdecimal():
            problem.retry_after = float(seconds)
        raise problem
    return Answer(response.status_code, response.headers, document)


def _receive(response: httpx.Response, into: _Destination) -> None:
    """The receive-into-buffer call: what comes from the socket goes to its place in the flat vector."""
    try:
        receiver = into.receiver(int(response.headers["content-length"]))
        for chunk in response.iter_raw():
            receiver.feed(chunk)
    except (MalformedTensors, KeyError, ValueError) as error:
        raise UnexpectedResponse(f"{response.request.url} did not answer with the run's tensors: {error}") from error
    if not receiver.complete:
        raise httpx.RemoteProtocolError("the body ended before its Content-Length", request=response.request)


def _document(response: httpx.Response) -> Any:
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError:
        if not response.is_success:
            return None
        raise UnexpectedResponse(f"{response.request.url} did not answer with JSON") from None
