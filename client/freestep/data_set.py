"""A data set of a run, its calls as Python: its units are handed out to workers, and each counts once a pass."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from freestep.answers import parse
from freestep.api.data import Claimed, DataSpec, DataStatus, Returned
from freestep.api.models import Lease
from freestep.leaving import hold_s
from freestep.service_url import in_path
from freestep.transport import Transport

__all__ = ["DataSet"]


class DataSet:
    """One data set of a run, from `Run.data`; it need not exist yet.

    Every call may raise a ProblemError, ServiceUnreachable or UnexpectedResponse. Safe to use from several threads.

    Example:
        >>> data = run.data("train")
        >>> data.create({"length": 60000, "unit": 256, "passes": 3})
        >>> with run.lease("worker-1") as lease:
        ...     unit = data.claim(lease.granted, 1).units[0]
        ...     receipt = run.push(gradients(unit.begin, unit.end), lease.claim(step, units={"train": [unit.unit]}))

    Args:
        transport: Sends the requests.
        path: The path of the run's data sets.
        name: The data set's name.
    """

    def __init__(self, transport: Transport, path: str, name: str) -> None:
        self.name = name
        self._transport = transport
        self._path = f"{path}/{in_path(name)}"

    def create(self, spec: DataSpec | Mapping[str, Any]) -> DataStatus:
        """Creates the data set, or finds it if it exists with the same spec.

        Args:
            spec: Its length, unit, passes, shuffle and seed, as a model or as its JSON document.

        Raises:
            DataExists: It exists with another spec.
            RunNotInitialized: The run has no weights yet.
        """
        document = spec.model_dump(mode="json") if isinstance(spec, DataSpec) else dict(spec)
        return parse(DataStatus, self._transport.request("PUT", self._path, json=document))

    def status(self) -> DataStatus:
        """How much of it is open, out and done, and which workers have units.

        Raises:
            DataNotFound: The run has no data set of this name.
        """
        return parse(DataStatus, self._transport.request("GET", self._path))

    def claim(self, lease: Lease, count: int, *, wait: float = 0.0, key: str | None = None) -> Claimed:
        """Takes units, which the lease holds until they are done, are given back, or the lease ends.

        Args:
            lease: The lease, as it was granted.
            count: How many are wanted at the most, 1 to 1024.
            wait: Seconds to wait for a unit where all that are left are out with others.
            key: The idempotency key: the lease's last claim, if it had the same, is answered again. Unique by default.

        Raises:
            LeaseExpired: The lease has ended, and its units are others'.
            EpochChanged: The run has gone back to an earlier step: take a new lease.
        """
        headers = {**_holder(lease), "Idempotency-Key": key or uuid.uuid4().hex}
        if wait:
            headers["Prefer"] = f"wait={hold_s(wait):g}"
        answer = self._transport.request(
            "POST", f"{self._path}/units", headers=headers, json={"count": count}, wait=wait
        )
        return parse(Claimed, answer)

    def give_back(self, lease: Lease, units: Iterable[int] | None = None) -> list[int]:
        """Gives units back, which others then get; those that the lease does not hold are ignored.

        Args:
            lease: The lease that holds them, as it was granted.
            units: Their numbers; None gives back all of this data set.

        Returns:
            The numbers of the units that were given back.
        """
        params = None if units is None else {"units": ",".join(map(str, units))}
        headers = {**_holder(lease), "Idempotency-Key": uuid.uuid4().hex}
        answer = self._transport.request("DELETE", f"{self._path}/units", headers=headers, params=params)
        return parse(Returned, answer).units


def _holder(lease: Lease) -> dict[str, str]:
    return {"Freestep-Lease": lease.lease, "Freestep-Token": str(lease.token)}
