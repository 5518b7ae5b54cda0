"""A worker's lease, renewed in the background while its holder lives."""

from __future__ import annotations

import logging
import threading
import uuid
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from freestep.api.models import Lease
from freestep.errors import EpochChanged, FreestepError, LeaseExpired, RunNotFound
from freestep.transport import Transport

__all__ = ["Claim", "HeldLease"]

logger = logging.getLogger("freestep")


@dataclass(frozen=True)
class Claim:
    """What a push says of itself. `key` makes it one push however often it is sent.

    step: where the gradient was taken. samples: how many it is a mean over; a group's gradients are weighted by it.
    speed: the steps that the worker takes by itself in a second.
    """

    lease: str
    token: int
    step: int
    samples: float | None = None
    loss: float | None = None
    speed: float | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def headers(self) -> dict[str, str]:
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
        return headers


class HeldLease:
    """A lease that a background thread renews every third of its time to live. Use it as a context manager.

    `lost` is the reason why the lease is no longer good, once that is known: LeaseExpired, EpochChanged or
    RunNotFound. A lost lease is not taken again behind its holder's back, who must pull first.
    """

    def __init__(self, transport: Transport, path: str, lease: Lease) -> None:
        self.granted = lease
        self.lost: FreestepError | None = None
        self._transport = transport
        self._path = f"{path}/{lease.lease}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"freestep-lease-{lease.worker}", daemon=True)
        self._thread.start()

    def claim(
        self, step: int, *, samples: float | None = None, loss: float | None = None, speed: float | None = None
    ) -> Claim:
        """A new push's claim under this lease, for a gradient taken at y of `step`."""
        return Claim(self.granted.lease, self.granted.token, step, samples, loss, speed)

    def _renew(self) -> None:
        while not self._ended.wait(self.granted.ttl_ms / 3000):
            try:
                self._transport.request("PUT", self._path, retry=False)
            except (LeaseExpired, EpochChanged, RunNotFound) as error:
                self.lost = error
                return
            except Exception as error:
                # The service is away or busy: the next push, or the next renewal, will tell.
                logger.debug("the lease of %s could not be renewed: %s", self.granted.worker, error)

    def release(self) -> None:
        """Ends the lease, so that a group does not wait for its worker; never raises."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self.lost is None:
            try:
                self._transport.request("DELETE", self._path, retry=False)
            except Exception as error:
                logger.debug("the lease of %s could not be released: %s", self.granted.worker, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
