"""What an HTTP response is to this client: a document, tensors in the place that they are for, or an error to raise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from freestep.bulk import pour
from freestep.errors import MalformedTensors, ProblemError, UnexpectedResponse
from freestep.proxies import PROXY
from freestep.service_url import without_password
from freestep.shared_memory import SharedMemory
from freestep.wire.receiver import MEDIA_TYPE, Receiver
from freestep.wire.spans import Span

__all__ = ["Answer", "Destination", "GatewayError", "read"]

_GATEWAY_STATUS = (408, 429, 502, 503, 504)
"""With these a gateway answers while the service behind it is away or busy, or where it has waited for a request."""

_NO_SUCH_PATH = (
    ": no freestep service has this path: see that the URL is a service's, without a path of its API or pages"
)


class GatewayError(UnexpectedResponse):
    """A gateway's answer that the service was not reached. Every request that is repeated is idempotent."""

    retry_after: float | None = None


@dataclass(frozen=True)
class Answer:
    """An answer: its status, its headers by names in lower case, and its JSON document, None if it has none."""

    status: int
    headers: Mapping[str, str]
    document: Any = None


class Destination(Protocol):
    """Where an answer's tensors are put."""

    def receiver(self, length: int) -> Receiver:
        """A receiver for a body of `length` bytes."""

    def decode(self, receiver: Receiver) -> None:
        """Decodes a body that was received as a whole."""


def read(response: httpx.Response, into: Destination | None, memory: SharedMemory | None = None) -> Answer:
    """Reads a response whose body is unread. into: where its tensors are put; it may be a JSON document instead.
    memory: where they may lie.

    Raises the ProblemError that it names, GatewayError, UnexpectedResponse if it is not freestep's, and TransportError
    where the connection ends too early.
    """
    # Converted once: httpx goes through all headers for each look-up.
    headers = dict(response.headers.items())
    if into is not None and headers.get("content-type") == MEDIA_TYPE and response.is_success:
        _receive(response, headers, into, memory)
        return Answer(response.status_code, headers)
    response.read()
    document = _document(response)
    if not response.is_success:
        # No name here has the error: with one, its traceback would keep all callers' memory until garbage is collected.
        raise _refusal(response, headers, document)
    return Answer(response.status_code, headers, document)


def _refusal(response: httpx.Response, headers: Mapping[str, str], document: Any) -> ProblemError | UnexpectedResponse:
    refusal: ProblemError | UnexpectedResponse | None = None
    if isinstance(document, dict):
        refusal = ProblemError.from_document(document)
    if refusal is None:
        kind = GatewayError if response.status_code in _GATEWAY_STATUS else UnexpectedResponse
        way = f" through {response.extensions[PROXY]}" if PROXY in response.extensions else ""
        place = without_password(str(response.request.url))
        advice = _NO_SUCH_PATH if response.status_code == 404 else ""
        refusal = kind(f"{place} answered {response.status_code}{way}: {response.text[:200]!r}{advice}")
    if isinstance(refusal, ProblemError | GatewayError) and headers.get("retry-after", "").isdecimal():
        refusal.retry_after = float(headers["retry-after"])
    return refusal


def _receive(
    response: httpx.Response, headers: Mapping[str, str], into: Destination, memory: SharedMemory | None
) -> None:
    """Receives an answer's body into the flat vector, straight from the socket where the transport can."""
    try:
        if memory is not None and (text := headers.get("freestep-span")) is not None:
            response.read()
            span = Span.parse(text)
            receiver = into.receiver(span.length)
            memory.pour(span, receiver)
        else:
            receiver = into.receiver(int(headers["content-length"]))
            pour(response, receiver)
    except (MalformedTensors, KeyError, ValueError) as error:
        raise UnexpectedResponse(
            f"{without_password(str(response.request.url))} did not answer with the run's tensors: {error}"
        ) from error
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
        raise UnexpectedResponse(f"{without_password(str(response.request.url))} did not answer with JSON") from None
