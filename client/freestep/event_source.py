"""Server-sent events of a run as an iterator, which comes again where a stream has ended."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import httpx

from freestep.api.events import RunEvent, event_of
from freestep.errors import MalformedRequest, UnexpectedResponse
from freestep.transport import Transport

__all__ = ["EventSource", "Message", "messages"]

_SILENCE_S = 30.0
"""Beyond the client's own timeout: a service with no event to tell of sends a comment every 15 seconds."""
_RETRY_S = 1.0
"""Seconds before a stream that has ended is asked for again, unless the service names others."""
_ID = re.compile("[!-~]+")
"""Visible ASCII characters, as every id has."""


@dataclass(frozen=True)
class Message:
    """A server-sent event, or (without data) a new time between two streams.

    data: empty where there is none. retry: in seconds.
    """

    data: str = ""
    retry: float | None = None


def messages(lines: Iterable[str]) -> Iterator[Message]:
    """The events in the lines of a stream, as the HTML standard has them. One without its empty line is cut off."""
    data: list[str] = []
    retry: float | None = None
    for line in lines:
        if not line:
            if data or retry is not None:
                yield Message("\n".join(data), retry)
            data, retry = [], None
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "retry" and value.isdecimal():
            retry = int(value) / 1000


class EventSource:
    """The events of a run, from one stream after the other.

    path: of the stream. sleep: for tests.
    """

    def __init__(self, transport: Transport, path: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self._transport = transport
        self._path = path
        self._sleep = sleep

    def events(self, after: str | None, from_step: int | None, *, follow: bool) -> Iterator[RunEvent]:
        """As `Run.events`."""
        if after is not None and not _ID.fullmatch(after):
            # In a header it would be no request.
            raise MalformedRequest("Last-Event-ID: must be the id of an event of this run")
        retry = _RETRY_S
        while True:
            headers = {"Last-Event-ID": after} if after is not None else {}
            params: dict[str, str | int] = {} if follow else {"follow": "false"}
            if from_step is not None and after is None:
                params["from"] = from_step
            response = self._transport.open(self._path, headers=headers, params=params, wait=_SILENCE_S)
            try:
                for message in messages(_lines(response)):
                    if message.retry is not None:
                        retry = message.retry
                    if message.data:
                        event = _event(message.data)
                        after = event.id
                        yield event
                is_cut = False
            except httpx.TransportError:
                is_cut = True
            finally:
                response.close()
            if not follow and not is_cut:
                return
            self._sleep(retry)


def _lines(response: httpx.Response) -> Iterator[str]:
    """Raises UnexpectedResponse where the answer is no stream of events."""
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        raise UnexpectedResponse(f"{response.request.url.path} was not answered with server-sent events")
    return response.iter_lines()


def _event(data: str) -> RunEvent:
    try:
        return event_of(json.loads(data))
    except (ValueError, AttributeError) as error:
        raise UnexpectedResponse(f"the service sent what is no event: {data[:200]!r}") from error
