"""The data sets of a run in Redis: their creation, claims of their units, how they stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from freestep.api.data import MOST_DATA_SETS, DataSpec
from freestep.errors import DataExists, DataNotFound, MalformedRequest
from freestep_service.coordination.run_scripts import RunScripts
from freestep_service.domain.data_progress import DataView, Out, UnitCounts
from freestep_service.domain.data_sets import NewDataSet
from freestep_service.domain.records import Owner

__all__ = ["HeldUnits", "RunData"]


class HeldUnits(NamedTuple):
    """The numbers of units that a claim was given. is_exhausted: whether every unit of every pass has counted."""

    spec: DataSpec
    numbers: list[int]
    is_exhausted: bool


class RunData:
    """The data sets of one run. Calls with an owner may raise Behind, Fenced and ShardUnavailable."""

    def __init__(self, scripts: RunScripts) -> None:
        self._scripts = scripts

    async def create(self, owner: Owner, new: NewDataSet) -> dict[str, Any] | None:
        """The log entry that a new data set has become; None where the run has it already.

        Raises DataExists, MalformedRequest where it has too many, and RunNotInitialized.
        """
        total = "" if new.spec.total is None else new.spec.total
        status, *rest = await self._scripts.call(
            "create_data", *owner.position, owner.shard, owner.token, new.name, new.spec.model_dump_json(), total,
            MOST_DATA_SETS,
        )  # fmt: skip
        match status:
            case "created":
                entry: dict[str, Any] = json.loads(rest[0])
                return entry
            case "same":
                return None
            case "different":
                raise DataExists(f"the run has the data set {new.name!r} as {rest[0]}")
            case "crowded":
                raise MalformedRequest(f"the run has {MOST_DATA_SETS} data sets already, which is the most")
        self._scripts.refuse(status, rest)

    async def claim(self, owner: Owner, lease: str, token: int, name: str, count: int, key: str) -> HeldUnits:
        """Hands out units to a lease, at most `count`.

        key: of the claim, which is given the same units if it comes again next; empty for none. Raises LeaseExpired,
        EpochChanged, RunNotInitialized, DataNotFound, and MalformedRequest where the lease has as many as it may have.
        """
        status, *rest = await self._scripts.call(
            "claim_units", *owner.position, owner.shard, owner.token, lease, token, name, count, key,
            keys=[self._scripts.lease_key(lease)],
        )  # fmt: skip
        if status == "claimed":
            spec, is_exhausted, *numbers = rest
            return HeldUnits(DataSpec.model_validate_json(spec), list(map(int, numbers)), bool(is_exhausted))
        if status == "laden":
            raise MalformedRequest(f"the lease has {rest[0]} units, which is the most: push them or give some back")
        self._scripts.refuse(status, rest)

    async def give_back(
        self, lease: str, token: int, name: str, numbers: Sequence[int] = (), key: str = ""
    ) -> list[int]:
        """Has units handed out again that a lease has: these numbers, or all; those that it had.

        key: of the return, which is answered alike if it comes again next; empty for none. Raises LeaseExpired,
        EpochChanged, RunNotInitialized, DataNotFound, and ShardUnavailable where Redis has lost the run.
        """
        keys = [self._scripts.lease_key(lease)]
        status, *rest = await self._scripts.call("return_units", lease, token, name, key, *numbers, keys=keys)
        if status != "returned":
            self._scripts.refuse(status, rest)
        return list(map(int, rest))

    async def read(self, name: str) -> DataView:
        """How a data set stands. Raises DataNotFound, and ShardUnavailable where Redis has lost the run."""
        if found := await self._views(name):
            return found[0]
        raise DataNotFound

    async def read_all(self) -> list[DataView]:
        """How the data sets stand, by name. Raises ShardUnavailable where Redis has lost the run."""
        return await self._views("")

    async def count(self) -> list[UnitCounts]:
        """How many units of each data set are open, out and done, by name; it reads no list of units."""
        return [
            UnitCounts.of(name, int(total) if total else None, int(cursor), int(done), back)
            for name, total, cursor, done, back in await self._scripts.call("count_units")
        ]

    async def _views(self, name: str) -> list[DataView]:
        status, *rest = await self._scripts.call("read_data", name)
        if status != "data":
            self._scripts.refuse(status, rest)
        now, workers, out, *sets = rest
        worker_of = dict(zip(workers[1::2], workers[::2], strict=True))
        held: dict[str, list[Out]] = {each[0]: [] for each in sets}
        for unit, value in zip(out[::2], out[1::2], strict=True):
            data, _, number = unit.partition(" ")
            lease, _, since = value.partition(" ")
            if data in held:
                held[data].append(Out(int(number), worker_of.get(lease, ""), int(since)))
        return [
            DataView(
                data,
                DataSpec.model_validate_json(spec),
                int(cursor),
                int(done),
                int(now),
                held[data],
                list(map(int, back)),
            )
            for data, spec, cursor, done, *back in sets
        ]
