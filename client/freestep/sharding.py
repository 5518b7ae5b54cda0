"""A run's shards as a client sees them: where each is, and requests to all of them at once.

Shards are contiguous stretches of the flat vector, so each is sent from, and received into, the one vector of the
whole model. A run of one shard is asked by plain requests to the service's own URL; so is a run of which nothing is
known yet, since these serve a model of many shards as well, only more slowly.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from freestep.api.models import RunStatus, Topology
from freestep.bulk import Body
from freestep.encoders import Encoder
from freestep.errors import (
    CoordinatorUnavailable,
    EpochChanged,
    FreestepError,
    MalformedTensors,
    Overloaded,
    ProblemError,
    ServiceUnreachable,
    ShardUnavailable,
    UnexpectedResponse,
)
from freestep.flat import Flat
from freestep.in_place_gradient import Loose
from freestep.transport import Answer, Transport, in_background
from freestep.worker_group import ALONE, Ranks

__all__ = ["PASSING", "Begun", "Call", "Layout", "Shards"]

_ASTRAY_S = 30.0
"""For how long a URL at which the service was not found is passed over."""
_REREAD_S = 1.0
"""How soon a layout that could not be read is read again: all requests that wait for it go on without."""
PASSING = (CoordinatorUnavailable, Overloaded, ShardUnavailable)
"""What a request that is made again may meet."""
_DOUBTS = (EpochChanged, ShardUnavailable, MalformedTensors)
"""Refusals after which the run may have another number of shards."""


class _Abandoned(FreestepError):
    """Another shard's request failed for good, so this one is not made again."""


class _Resharded(FreestepError):
    """The run has another number of shards than the requests were made for."""


@dataclass(frozen=True)
class Layout:
    """Where a run's shards are in an epoch: each one's URL, or nothing for the service's own. Epoch 0: not known."""

    epoch: int = 0
    urls: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Call:
    """A request that is made of every shard: with its stretch of `body`, for its stretch of `into`."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Flat | Loose | Encoder | None = None
    into: Flat | None = None
    wait: float = 0.0


@dataclass(frozen=True)
class Begun:
    """A call whose requests are being made in the background."""

    calls: _Calls
    outcomes: Future[dict[int, Answer | FreestepError]]

    def abandon(self) -> None:
        """Has no request made again."""
        self.calls.abandoned.set()


class Shards:
    """A run's shards.

    status, topology: ask the service for these; their argument says whether to ask again where it is away. ranks:
    each of them makes its share of the requests in `ask`.
    """

    def __init__(
        self,
        transport: Transport,
        status: Callable[[bool], RunStatus],
        topology: Callable[[bool], Topology],
        ranks: Ranks,
    ) -> None:
        self._transport = transport
        self._status = status
        self._topology = topology
        self._ranks = ranks
        self._layout = Layout()
        self._outdated = False
        self._reading = threading.Lock()
        self._not_before = 0.0
        self._astray: dict[str, float] = {}

    def heard(self, epoch: int, count: int | None = None) -> None:
        """Takes note of the run's epoch and, if it is known, its number of shards."""
        known = self._layout
        if count is None:
            self._outdated |= known.epoch not in (0, epoch)
        elif (epoch, count) != (known.epoch, len(known.urls)):
            if count == 1:
                self._layout = Layout(epoch)
            self._outdated = count != 1

    def begin(self, call: Call) -> Begun:
        """Has the requests of a call made in the background; `ask` has their answers.

        Every rank begins it and asks for it. What it sends must not be changed meanwhile, nor `into` be used.
        """
        calls = self._calls(call, self._ranks)
        return Begun(calls, in_background(calls.made))

    def ask(self, call: Call, *, alone: bool = False, begun: Begun | None = None) -> list[Answer]:
        """Makes a call of every shard, all at the same time; returns their answers, by shard.

        Returns, or raises, when the last request has ended. What one shard refuses is raised, and of several
        refusals that of the first shard. Each rank makes its share of the requests; all get all answers, and each
        the stretches of `into` that it asked for. With `alone` this process makes all requests. begun: where the
        requests are being made already.
        """
        ranks = ALONE if alone else self._ranks
        while True:
            # Only here do ranks wait for each other, never in the background: no two of them would agree on when.
            calls = begun.calls if begun is not None else self._calls(call, ranks)
            told = ranks.every(begun.outcomes.result if begun is not None else calls.made)
            begun = None
            outcomes = {shard: outcome for each in told for shard, outcome in each.items()}
            failures = [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, FreestepError)]
            if not failures:
                return [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, Answer)]
            failure = min(failures, key=_precedence)
            if not isinstance(failure, _Resharded):
                self._outdated |= isinstance(failure, _DOUBTS)
                raise failure
            # Unless it was this rank that found out.
            self._outdated |= len(self._layout.urls) == calls.count

    def _calls(self, call: Call, ranks: Ranks) -> _Calls:
        layout, token = ranks.first(self._plan)
        self._adopt(layout)
        count = len(layout.urls)
        mine = [shard for shard in range(count) if ranks.owns(shard)]
        return _Calls(self._transport, self, call, count, mine, token)

    def _plan(self) -> tuple[Layout, str]:
        """What the requests of one call agree on: where the shards are, and a token that no other call has."""
        with self._reading:
            if self._outdated:
                self._layout, self._outdated = self._read(retry=True), False
            return self._layout, uuid.uuid4().hex

    def _read(self, *, retry: bool) -> Layout:
        status = self._status(retry)
        if status.shards > 1:
            topology = self._topology(retry)
            urls = tuple(self._usable(shard.url) for shard in topology.shards)
            return Layout(topology.epoch, urls if len(urls) > 1 else ("",))
        return Layout(status.epoch)

    def _usable(self, url: str | None) -> str:
        # A token that was trusted to TLS does not travel without it.
        schemes = ("https://",) if self._transport.base_url.scheme == "https" else ("http://", "https://")
        return url.rstrip("/") if url is not None and url.startswith(schemes) else ""

    def _adopt(self, layout: Layout) -> None:
        """Takes over rank 0's layout, unless this rank's own is as good, and perhaps newer."""
        if (layout.epoch, len(layout.urls)) != (self._layout.epoch, len(self._layout.urls)):
            self._layout, self._outdated = layout, False

    def place(self, shard: int, count: int) -> tuple[Layout, str]:
        """Where a shard of `count` is now, and by which layout. Raises _Resharded when there are not so many."""
        with self._reading:
            if self._outdated and time.monotonic() >= self._not_before:
                try:
                    self._layout, self._outdated = self._read(retry=False), False
                except (*PASSING, ServiceUnreachable, UnexpectedResponse):
                    # Then where the shard was last is as good a place as any.
                    self._not_before = time.monotonic() + _REREAD_S
            layout = self._layout
        if len(layout.urls) != count:
            raise _Resharded(f"the run has {len(layout.urls)} shards by now, and not {count}")
        url = layout.urls[shard]
        return layout, "" if time.monotonic() < self._astray.get(url, 0.0) else url

    def doubt(self, layout: Layout) -> None:
        """Takes note that a shard was not where a layout said."""
        self._outdated |= self._layout is layout

    def pass_over(self, url: str) -> None:
        """Takes note that the service is not to be found at a URL; the service's own URL relays instead."""
        self._astray[url] = time.monotonic() + _ASTRAY_S


class _Calls:
    """The requests that this process makes for one call."""

    def __init__(
        self, transport: Transport, shards: Shards, call: Call, count: int, mine: Sequence[int], token: str
    ) -> None:
        self._transport = transport
        self._call = call
        self._mine = mine
        self._token = token
        self.shards = shards
        self.count = count
        self.abandoned = threading.Event()
        self._bodies: list[Body] = []

    def made(self) -> dict[int, Answer | FreestepError]:
        """Makes the requests of the shards that are this rank's; what became of each."""
        if self._call.body is not None:
            # Here, before there are threads; and for all shards, so that every rank has the residual of all.
            self._bodies = [Body(part.body()) for part in self._call.body.parts(self.count)]
        works = [partial(self._outcome, shard) for shard in self._mine]
        try:
            outcomes = self._transport.at_once(works) if len(works) > 1 else [work() for work in works]
        finally:
            # Only an interrupt leaves requests behind, and those are not to be retried.
            self.abandoned.set()
        return dict(zip(self._mine, outcomes, strict=True))

    def _outcome(self, shard: int) -> Answer | FreestepError:
        try:
            return self._request(shard)
        except FreestepError as error:
            self.abandoned.set()
            return error
        except BaseException:
            self.abandoned.set()
            raise

    def _request(self, shard: int) -> Answer:
        call, headers, params = self._call, dict(self._call.headers), dict(self._call.params)
        # In I8 there are only parts: by its name, not even a run's only shard is ever taken for the whole of several.
        is_named = self.count > 1 or params.get("dtype") == "I8"
        if is_named:
            params |= {"shard": shard, "of": self.count}
        if self.count > 1:
            # What makes the requests one call; a push has its claim's key for that.
            if call.method == "GET":
                params["cut"] = self._token
            elif call.method == "PUT":
                headers["Idempotency-Key"] = self._token
        return self._transport.request(
            call.method,
            call.path,
            headers=headers,
            params=params,
            body=self._bodies[shard] if self._bodies else None,
            into=None if call.into is None else call.into.parts(self.count)[shard],
            wait=call.wait,
            place=_Place(self, shard) if is_named else None,
        )


class _Place:
    """Where a shard is, for the attempts of one request."""

    def __init__(self, calls: _Calls, shard: int) -> None:
        self._calls = calls
        self._shard = shard
        self._layout: Layout | None = None

    def url(self) -> str:
        if self._calls.abandoned.is_set():
            raise _Abandoned(f"the request of shard {self._shard} was given up, since another one failed")
        self._layout, url = self._calls.shards.place(self._shard, self._calls.count)
        return url

    def failed(self, url: str, error: Exception) -> None:
        # A busy service, or one whose Redis is away, is where it was said to be.
        if self._layout is not None and not isinstance(error, CoordinatorUnavailable | Overloaded):
            self._calls.shards.doubt(self._layout)

    def astray(self, url: str) -> None:
        self._calls.shards.pass_over(url)


def _precedence(failure: FreestepError) -> int:
    """Which of several shards' failures says most: what the service decided, before what only happened to a request."""
    if isinstance(failure, _Abandoned):
        return 3
    if isinstance(failure, _Resharded):
        return 1
    return 0 if isinstance(failure, ProblemError) and not isinstance(failure, PASSING) else 2
