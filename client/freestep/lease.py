"""Leases that are renewed in the background, and the claims of pushes under them."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from freestep.api.models import Lease, LeaseRequest
from freestep.api.validation import first_fault
from freestep.errors import (
    CoordinatorUnavailable,
    EpochChanged,
    FreestepError,
    LeaseExpired,
    MalformedRequest,
    RunNotFound,
    ServiceUnreachable,
    ShardUnavailable,
)
from freestep.leaving import PATIENCE_S, is_leaving
from freestep.transport import Transport

__all__ = ["Claim", "HeldLease", "release_leases", "worker_name"]

logger = logging.getLogger("freestep")

_SHORTEST_PATIENCE_S = 1.0
"""Seconds for which the answer to a renewal is waited for, at the least."""
_RELEASE_S, _AGAIN_S = 2.0, 0.2
"""Seconds for which a process that leaves tries to release its lease where nobody answers, and between two attempts."""


def worker_name(given: str | None = None) -> str:
    """The name that is given, or a unique one: host, process ID and a random part.

    Raises MalformedRequest for a name that no worker can have.
    """
    name = given or f"{socket.gethostname()[:100]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    try:
        return LeaseRequest(worker=name).worker
    except ValidationError as error:
        raise MalformedRequest(f"worker: {first_fault(error)[1]}") from None


@dataclass(frozen=True)
class Claim:
    """The lease, step and key of one push, from `HeldLease.claim`.

    Args:
        lease: The lease's ID.
        token: The lease's fencing token.
        step: The step of the y at which the gradient was computed.
        samples: How many samples the gradient is a mean over, its weight in the mean of a group; None weighs 1.
        loss: The mean training loss over these samples.
        speed: Local steps a second of this worker, if it takes local steps.
        units: The units of the run's data sets that the gradient was taken on, by the data set's name; the lease must
            hold them. They are done once the push counts.
        key: The idempotency key: pushes with the same key count once. Unique by default.
    """

    lease: str
    token: int
    step: int
    samples: float | None = None
    loss: float | None = None
    speed: float | None = None
    units: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def headers(self) -> dict[str, str]:
        """The claim as HTTP request headers."""
        headers = {
            "Freestep-Lease": self.lease,
            "Freestep-Token": str(self.token),
            "Freestep-Step": str(self.step),
            "Idempotency-Key": self.key,
        }
        if self.samples is not None:
            headers["Freestep-Samples"] = repr(float(self.samples))
        if self.loss is not None:
            headers["Freestep-Loss"] = repr(float(self.loss))
        if self.speed is not None:
            headers["Freestep-Speed"] = repr(float(self.speed))
        if self.units:
            headers["Freestep-Units"] = ";".join(
                f"{name}={','.join(map(str, numbers))}" for name, numbers in self.units.items()
            )
        return headers


class HeldLease:
    """A worker's lease, from `Run.lease`; a daemon thread renews it every third of its time to live, and again soon
    where that has failed.

    Use it as a context manager, or call `release`; one that is left is released when its client is closed, or the
    process exits. Attributes:
    `granted`, the lease as the service granted it (ID, token, worker, `ttl_ms`, epoch, step); `lost`, None while the
    lease is good as far as is known, else the error that ended it (LeaseExpired, EpochChanged or RunNotFound). A lost
    lease is not replaced: take a new one, and pull y, since the run may have gone back to an earlier step.

    Safe to use from several threads. In a forked child it is the parent's: there it is neither renewed nor released.

    Example:
        >>> with run.lease("worker-1") as lease:
        ...     receipt = run.push(gradients, lease.claim(step))

    Args:
        transport: Sends the renewals.
        path: The path of the run's leases.
        lease: The lease that was granted.
    """

    def __init__(self, transport: Transport, path: str, lease: Lease) -> None:
        self.granted = lease
        self.lost: FreestepError | None = None
        self._transport = transport
        self._path = f"{path}/{lease.lease}"
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._hold, name=f"freestep-lease-{lease.worker}", daemon=True)
        # First: it discards the lease as it ends.
        _leases.add(self)
        try:
            self._thread.start()
        except BaseException:
            # Nobody gets this object, so nobody would release it.
            self._released.set()
            raise

    def claim(
        self,
        step: int,
        *,
        samples: float | None = None,
        loss: float | None = None,
        speed: float | None = None,
        units: Mapping[str, Sequence[int]] | None = None,
    ) -> Claim:
        """A claim for one new push under this lease.

        Args:
            step: The step of the y at which the gradient was computed.
            samples: How many samples the gradient is a mean over, its weight in the mean of a group; None weighs 1.
            loss: The mean training loss over these samples; `adamc_schedule_free_plus` needs it.
            speed: Local steps a second of this worker, if it takes local steps.
            units: The units of data sets that the gradient was taken on, as for Claim.
        """
        return Claim(self.granted.lease, self.granted.token, step, samples, loss, speed, units or {})

    def _hold(self) -> None:
        try:
            self._renew()
        finally:
            _leases.discard(self)

    def _renew(self) -> None:
        # A connection that is dead must not take the time in which another renewal would be good.
        third = pause = self.granted.ttl_ms / 3000
        patience = max(third, _SHORTEST_PATIENCE_S)
        while not self._released.wait(pause):
            pause = third
            try:
                self._transport.request("PUT", self._path, patience=patience, retry=False)
            except (LeaseExpired, EpochChanged, RunNotFound) as error:
                self.lost = error
                self._transport.memories.forget(self.granted.lease)
                return
            except Exception as error:
                # The next renewal, or the next push, will show whether the lease has ended meanwhile.
                pause = third / 5
                logger.debug("the lease of %s could not be renewed: %s", self.granted.worker, error)
        self._transport.memories.forget(self.granted.lease)
        deadline = time.monotonic() + _RELEASE_S
        while not self._is_ended():
            # Where a node is drained, the service's process that was asked may be leaving with this one.
            if not is_leaving() or time.monotonic() > deadline:
                break
            time.sleep(_AGAIN_S)

    def _is_ended(self) -> bool:
        """Asks for its end; False if no service has answered, so that another attempt may help."""
        try:
            self._transport.request("DELETE", self._path, retry=False)
        except Exception as error:
            logger.debug("the lease of %s could not be released: %s", self.granted.worker, error)
            return not isinstance(error, CoordinatorUnavailable | ServiceUnreachable | ShardUnavailable)
        return True

    def release(self) -> None:
        """Ends the lease, so that groups do not wait for this worker, and its units of data are others'.

        Sends one request at most; once SIGTERM has come, more within 2 seconds if no service answers. Waits for 5
        seconds at most, and never raises.
        """
        _release([self])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_leases: set[HeldLease] = set()
"""Those whose threads have not ended."""


def _release(leases: Iterable[HeldLease]) -> None:
    # A forked child has none of the threads.
    held = [lease for lease in leases if lease._thread.is_alive()]
    deadline = time.monotonic() + PATIENCE_S
    for lease in held:
        # Its thread sends the request, so that a signal which breaks the wait for it off does not break that off.
        lease._released.set()
    for lease in held:
        # A thread that collects garbage may release the lease that it holds.
        if lease._thread is not threading.current_thread():
            lease._thread.join(max(deadline - time.monotonic(), 0.0))


def release_leases(transport: Transport) -> None:
    """Ends the leases whose requests a transport sends, as `HeldLease.release` does."""
    _release(lease for lease in _leases.copy() if lease._transport is transport)


atexit.register(lambda: _release(_leases.copy()))
os.register_at_fork(after_in_child=_leases.clear)
