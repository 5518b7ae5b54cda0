"""A worker's name in a run, and whether another process works under it.

The law of this file: a lease that was asked for, and whose grant was not heard of, is one's own: it is not taken for
another process's.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from freestep.api.models import WorkerStatus
from freestep.errors import WorkerNameTaken

__all__ = ["OwnName"]

L_co = TypeVar("L_co", covariant=True)


class LeasedRun(Protocol[L_co]):
    """What `Run` and `LocalRun` have of leases."""

    name: str

    def lease(self, worker: str) -> L_co:
        """Takes a lease."""

    def workers(self, lease: str | None) -> list[WorkerStatus]:
        """The workers that hold a lease; of leases, the one that is given alone is shown."""


class OwnName(Generic[L_co]):
    """Takes leases of one worker of a run, and tells them from those of another process of its name.

    advice: what to do where another process has the name.
    """

    def __init__(self, run: LeasedRun[L_co], advice: str) -> None:
        self._run = run
        self._advice = advice
        self._may_have_another = False
        """Whether a lease may have been granted whose answer never came."""

    def take_lease(self, worker: str) -> L_co:
        """Takes a lease. Raises what `Run.lease` does."""
        self._may_have_another = True
        lease = self._run.lease(worker)
        self._may_have_another = False
        return lease

    def lives_elsewhere(self, worker: str, own: str | None) -> bool:
        """Whether there is a lease of this name beside one's own, which is `own`."""
        return any(each.worker == worker and each.lease is None for each in self._run.workers(own))

    def require(self, worker: str, own: str | None) -> None:
        """Raises WorkerNameTaken if another process has taken a lease of this name."""
        if not self._may_have_another and self.lives_elsewhere(worker, own):
            raise WorkerNameTaken(
                f"another process works on the run {self._run.name!r} as {worker!r}, and has taken the lease of this "
                f"one: {self._advice}"
            )
