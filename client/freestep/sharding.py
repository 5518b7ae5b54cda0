"""Requests to all shards of a run at once, and where the shards are.

Shards are contiguous parts of the flat vector, so each one's tensors are sent from, and received into, the one vector
of the whole model. A run of one shard is asked at the service's own URL, and so is a run whose shards are not known
yet: the service relays requests for the whole model, only more slowly.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from freestep.api.models import RunStatus, Topology
from freestep.bulk_exchange import Body
from freestep.errors import (
    CoordinatorUnavailable,
    EpochChanged,
    FreestepError,
    IssuerUnavailable,
    MalformedTensors,
    Overloaded,
    ProblemError,
    ServiceUnreachable,
    ShardUnavailable,
    UnexpectedResponse,
)
from freestep.forks import ForkLock
from freestep.responses import Answer
from freestep.shared_memory import Bodies
from freestep.threads import result_of, run_in_background
from freestep.transport import Transport
from freestep.wire.header import data_length
from freestep.worker_group import SINGLE_PROCESS, WorkerGroup

if TYPE_CHECKING:
    from freestep.encoders import Encoder
    from freestep.flat import Flat
    from freestep.in_place_gradient import InPlaceGradient

__all__ = ["TRANSIENT", "PendingCall", "ShardClient", "ShardMap", "ShardedCall"]

_UNREACHABLE_S = 30.0
"""Seconds for which a URL at which the service was not found is not tried again."""
_REFRESH_S = 1.0
"""Seconds between two attempts to read the shard map while requests go on with the old one."""
TRANSIENT = (CoordinatorUnavailable, IssuerUnavailable, Overloaded, ShardUnavailable)
"""Refusals after which the same request may succeed."""
_SUGGEST_RESHARDING = (EpochChanged, ShardUnavailable, MalformedTensors)
"""Refusals after which the run may have another number of shards."""


class _Abandoned(FreestepError):
    """The request is not repeated, since another shard's request has failed for good."""


class _Resharded(FreestepError):
    """The run has another number of shards than the requests were made for."""


@dataclass(frozen=True)
class ShardMap:
    """The URL of each shard's owner in an epoch, empty for the service's own URL. Epoch 0 means not known."""

    epoch: int = 0
    urls: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class ShardedCall:
    """A request to every shard, each with its part of `body` and of `into`."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Flat | InPlaceGradient | Encoder | None = None
    into: Flat | None = None
    wait: float = 0.0


@dataclass(frozen=True)
class PendingCall:
    """A call whose requests are being sent in the background."""

    requests: _ShardRequests
    outcomes: Future[dict[int, Answer | FreestepError]]

    def abandon(self) -> None:
        """Stops retries of its requests."""
        self.requests.abandoned.set()


class ShardClient:
    """Sends requests to a run's shards.

    status, topology: read these from the service; their argument is whether to retry. worker_group: each rank sends
    the requests of some shards.
    """

    def __init__(
        self,
        transport: Transport,
        status: Callable[[bool], RunStatus],
        topology: Callable[[bool], Topology],
        worker_group: WorkerGroup,
    ) -> None:
        self._transport = transport
        self._status = status
        self._topology = topology
        self._worker_group = worker_group
        self._map = ShardMap()
        self._outdated = False
        self._map_lock = ForkLock()
        self._refresh_at = 0.0
        self._unreachable_until: dict[str, float] = {}

    def note_epoch(self, epoch: int, shards: int | None = None) -> None:
        """Compares the shard map with an epoch and, if given, a number of shards that the service has named."""
        known = self._map
        if shards is None:
            self._outdated |= known.epoch not in (0, epoch)
        elif (epoch, shards) != (known.epoch, len(known.urls)):
            if shards == 1:
                self._map = ShardMap(epoch)
            self._outdated = shards != 1

    def start(self, call: ShardedCall) -> PendingCall:
        """Sends a call's requests in the background; `request_all` waits for their answers.

        Collective. The call's body must not change, and `into` must not be used, until then.
        """
        requests = self._requests(call, self._worker_group)
        return PendingCall(requests, run_in_background("freestep-push", requests.send))

    def request_all(
        self, call: ShardedCall, *, by_this_rank: bool = False, pending: PendingCall | None = None
    ) -> list[Answer]:
        """Sends a call to every shard at the same time; returns the answers by shard.

        Collective: each rank sends some of the requests; every rank gets all answers, but only its own parts of `into`.
        by_this_rank: sends all requests from this process, without the other ranks. pending: requests that were sent
        by `start`.

        Returns or raises when the last request has ended. Raises the refusal of the first shard that refused.
        """
        worker_group = SINGLE_PROCESS if by_this_rank else self._worker_group
        while True:
            # Ranks wait for each other here and never in the background, where they could not agree on an order.
            requests = pending.requests if pending is not None else self._requests(call, worker_group)
            gathered = worker_group.run_on_all(
                partial(result_of, pending.outcomes) if pending is not None else requests.send
            )
            pending = None
            outcomes = {shard: outcome for each in gathered for shard, outcome in each.items()}
            failures = [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, FreestepError)]
            if not failures:
                return [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, Answer)]
            failure = min(failures, key=_precedence)
            if not isinstance(failure, _Resharded):
                self._outdated |= isinstance(failure, _SUGGEST_RESHARDING)
                try:
                    raise failure
                finally:
                    # Its traceback has this frame: else both, and all callers' memory, wait until garbage is collected.
                    del gathered, outcomes, failures, failure
            # The rank that noticed has the new map already.
            self._outdated |= len(self._map.urls) == requests.count

    def _requests(self, call: ShardedCall, worker_group: WorkerGroup) -> _ShardRequests:
        shard_map, token = worker_group.run_on_first(self._current_map)
        self._adopt(shard_map)
        count = len(shard_map.urls)
        own = [shard for shard in range(count) if worker_group.requests_shard(shard)]
        return _ShardRequests(self._transport, self, call, count, own, token)

    def _current_map(self) -> tuple[ShardMap, str]:
        """The shard map, and a token that makes the requests of one call a unit."""
        with self._map_lock.held:
            if self._outdated:
                self._map, self._outdated = self._read_map(retry=True), False
            return self._map, uuid.uuid4().hex

    def _read_map(self, *, retry: bool) -> ShardMap:
        status = self._status(retry)
        if status.shards > 1:
            topology = self._topology(retry)
            urls = tuple(self._usable_url(shard.url) for shard in topology.shards)
            return ShardMap(topology.epoch, urls if len(urls) > 1 else ("",))
        return ShardMap(status.epoch)

    def _usable_url(self, url: str | None) -> str:
        # A token that is given to a service over TLS must not be sent without TLS.
        schemes = ("https://",) if self._transport.base_url.scheme == "https" else ("http://", "https://")
        return url.rstrip("/") if url is not None and url.startswith(schemes) else ""

    def _adopt(self, shard_map: ShardMap) -> None:
        """Takes over rank 0's map, unless this rank's own is of the same epoch and size, and perhaps newer."""
        if (shard_map.epoch, len(shard_map.urls)) != (self._map.epoch, len(self._map.urls)):
            self._map, self._outdated = shard_map, False

    def locate(self, shard: int, count: int) -> tuple[ShardMap, str]:
        """The URL of a shard of `count`, and the map that it is from. Raises _Resharded if the run has another number.

        Reads the map anew if it is outdated; if that fails, the last known URL is as good as any.
        """
        with self._map_lock.held:
            if self._outdated and time.monotonic() >= self._refresh_at:
                try:
                    self._map, self._outdated = self._read_map(retry=False), False
                except (*TRANSIENT, ServiceUnreachable, UnexpectedResponse):
                    self._refresh_at = time.monotonic() + _REFRESH_S
            shard_map = self._map
        if len(shard_map.urls) != count:
            raise _Resharded(f"the run now has {len(shard_map.urls)} shards, not {count}")
        url = shard_map.urls[shard]
        return shard_map, "" if time.monotonic() < self._unreachable_until.get(url, 0.0) else url

    def mark_outdated(self, shard_map: ShardMap) -> None:
        """Has the map read anew, if it is still this one."""
        self._outdated |= self._map is shard_map

    def avoid(self, url: str) -> None:
        """Sends the requests for an owner's URL to the service's own URL for some time, which relays them."""
        self._unreachable_until[url] = time.monotonic() + _UNREACHABLE_S


class _ShardRequests:
    """The requests that this process sends for one call."""

    def __init__(
        self,
        transport: Transport,
        shards: ShardClient,
        call: ShardedCall,
        count: int,
        own: Sequence[int],
        token: str,
    ) -> None:
        self._transport = transport
        self._call = call
        self._own = own
        self._token = token
        self.shards = shards
        self.count = count
        self.abandoned = threading.Event()
        self._bodies: list[Body] = []

    def send(self) -> dict[int, Answer | FreestepError]:
        """Sends the requests of this rank's shards; returns each one's answer or error."""
        if self._call.body is not None:
            # Encoded before there are threads, and for all shards, so that every rank has the whole residual.
            self._bodies = [Body(part.body()) for part in self._call.body.parts(self.count)]
        functions = [partial(self._outcome, shard) for shard in self._own]
        if len(functions) > 1:
            # After an interrupt they must not be repeated.
            outcomes = self._transport.threads.run_all(functions, given_up=self.abandoned.set)
        else:
            outcomes = [function() for function in functions]
        return dict(zip(self._own, outcomes, strict=True))

    def _outcome(self, shard: int) -> Answer | FreestepError:
        try:
            return self._request(shard)
        except FreestepError as error:
            self.abandoned.set()
            # Where it is a value, frames that keep it would be kept by its traceback.
            return error.with_traceback(None)
        except BaseException:
            self.abandoned.set()
            raise

    def _request(self, shard: int) -> Answer:
        call, headers, params = self._call, dict(self._call.headers), dict(self._call.params)
        # I8 exists shard by shard only; naming the shard also keeps a run's only one apart from the whole of several.
        is_named = self.count > 1 or params.get("dtype") == "I8"
        if is_named:
            params |= {"shard": shard, "of": self.count}
        if self.count > 1 and call.method == "GET":
            # What makes the requests one call; for those that bring a body that is their key.
            params["cut"] = self._token
        return self._transport.request(
            call.method,
            call.path,
            headers=headers,
            params=params,
            body=self._bodies[shard] if self._bodies else None,
            into=None if call.into is None else call.into.parts(self.count)[shard],
            wait=call.wait,
            route=_ShardRoute(self, shard) if is_named else None,
            bodies=self._moved(shard),
        )

    def _moved(self, shard: int) -> Bodies | None:
        """What a request moves, where it may lie in memory: a push and its answer, or a point that is not waited for.

        Who waits, a watching thread say, would keep the memory from pushes.
        """
        call = self._call
        if call.method == "PUT" or (call.method == "GET" and call.wait):
            return None
        part = None if call.into is None else call.into.parts(self.count)[shard]
        size = 0 if part is None else data_length(part.manifest, part.arrives)
        lease, token = call.headers.get("Freestep-Lease", ""), int(call.headers.get("Freestep-Token", 0))
        return Bodies(call.path.rpartition("/")[0], shard, size, lease, token)


class _ShardRoute:
    """The URL of a shard's owner, for the attempts of one request."""

    def __init__(self, requests: _ShardRequests, shard: int) -> None:
        self._requests = requests
        self._shard = shard
        self._map: ShardMap | None = None

    def url(self) -> str:
        self._require_wanted()
        self._map, url = self._requests.shards.locate(self._shard, self._requests.count)
        return url

    def failed(self, url: str, error: Exception) -> None:
        self._require_wanted()
        # An overloaded owner, or one whose Redis does not answer, is still the owner.
        if self._map is not None and not isinstance(error, CoordinatorUnavailable | Overloaded):
            self._requests.shards.mark_outdated(self._map)

    def unreachable(self, url: str) -> None:
        self._requests.shards.avoid(url)

    def _require_wanted(self) -> None:
        if self._requests.abandoned.is_set():
            raise _Abandoned(f"the request of shard {self._shard} was given up because another one failed")


def _precedence(failure: FreestepError) -> int:
    """Which of several shards' failures to raise: refusals first, then a resharding, then transient errors."""
    if isinstance(failure, _Abandoned):
        return 3
    if isinstance(failure, _Resharded):
        return 1
    return 0 if isinstance(failure, ProblemError) and not isinstance(failure, TRANSIENT) else 2
