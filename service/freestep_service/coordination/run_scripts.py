"""The keys of one run in Redis, calls of scripts with them, and the refusals of those scripts as exceptions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from freestep.errors import (
    PROBLEMS,
    CoordinatorUnavailable,
    DataNotFound,
    EpochChanged,
    IdempotencyConflict,
    LeaseExpired,
    MalformedRequest,
    NonFiniteGradient,
    RunNotInitialized,
    RunPaused,
    ShardUnavailable,
    UnitNotHeld,
    WorkerBanned,
    WorkerSuspended,
)
from freestep_service.coordination.store import Store
from freestep_service.domain.records import Ahead, Behind, Fenced, LogPosition, Lost, Pending

__all__ = ["DELETED_KEY", "DELETION_TIMES_KEY", "RUNS_KEY", "RunScripts", "not_open"]

RUNS_KEY = "freestep:runs"
"""The set of the names of all runs; the key belongs to no run."""
DELETED_KEY = "freestep:deleted"
"""A hash: the name of each run that was deleted lately -> its last epoch, see lua/note_deletion.lua."""
DELETION_TIMES_KEY = "{freestep:deleted}:times"
"""When that was. The hash tag keeps both keys on one server of a cluster."""

_NAMES = (
    "run", "leases", "workers", "receipts", "pending", "group", "log", "ended", "shards", "staged", "queue", "cuts",
)  # fmt: skip
"""The keys that every script takes first, in the order of lua/_prelude.lua."""
_LAST_NAMES = ("metrics", "out", "held", "back")
"""The keys that every script takes last."""


class RunScripts:
    """Calls the scripts of lua/ for one run. All keys share one hash tag, so that Redis Cluster keeps them together."""

    def __init__(self, store: Store, run: str) -> None:
        self.store = store
        self.run = run
        self._keys = [self.key(name) for name in _NAMES]
        self._last_keys = [self.key(name) for name in _LAST_NAMES]

    def key(self, name: str) -> str:
        return f"freestep:{{{self.run}}}:{name}"

    def lease_key(self, lease: str) -> str:
        return self.key(f"lease:{lease}")

    def window_key(self, lease: str) -> str:
        """The list of the newest idempotency keys that were used under a lease."""
        return self.key(f"window:{lease}")

    async def call(self, script: str, *arguments: str | int, keys: Sequence[str] = ()) -> list[Any]:
        """Calls a script by the name of its file; `keys` stand between those that every script takes.

        Returns the members of its answer, of which the first is the status in most scripts.
        Raises CoordinatorUnavailable.
        """
        answer = await self.store.run(script, [*self._keys, *keys, *self._last_keys], *arguments)
        return answer if isinstance(answer, list) else [answer]

    def refuse(self, status: str, rest: Iterable[Any]) -> NoReturn:
        """Raises the exception for a status that several scripts return."""
        match [status, *rest]:
            case ["behind"]:
                raise Behind
            case ["fenced"]:
                raise Fenced
            case ["not-open", missing]:
                raise not_open(self.run, json.loads(missing))
            case ["lost", *place]:
                raise Lost(LogPosition(*place) if place else None)
            case ["pending"]:
                raise Pending
            case ["ahead"]:
                raise Ahead
            case ["lease-expired"]:
                raise LeaseExpired
            case ["epoch-changed", epoch]:
                raise EpochChanged(f"the run is in epoch {epoch} now", epoch=epoch)
            case ["worker-banned", outliers]:
                raise WorkerBanned(f"{outliers} pushes of the worker were outliers", outliers=outliers)
            case ["worker-suspended", left_ms]:
                raise suspended(left_ms)
            case ["run-paused"]:
                raise RunPaused
            case ["step-ahead", step]:
                raise MalformedRequest(f"the step is ahead of the run's step {step}", step=step)
            case ["run-not-initialized"]:
                raise RunNotInitialized
            case ["idempotency-conflict"]:
                raise IdempotencyConflict
            case ["unit-not-held", units]:
                raise UnitNotHeld(f"the lease does not have {units}", units=units)
            case ["data-not-found"]:
                raise DataNotFound
            case ["refused-before", slug, detail]:
                raise PROBLEMS[slug](detail or None)
            case ["refused"]:
                raise NonFiniteGradient("the gradient's norm is so large that its square overflows fp32")
        raise CoordinatorUnavailable(f"unexpected answer of a script: {status}")


def suspended(left_ms: int) -> WorkerSuspended:
    """The refusal of a lease for so many ms more."""
    left_s = max(1, math.ceil(left_ms / 1000))
    refusal = WorkerSuspended(f"an operator has ended the worker's lease: it may have another in {left_s} s")
    refusal.retry_after = left_s
    return refusal


def not_open(run: str, missing: Sequence[int], reason: str | None = None) -> ShardUnavailable:
    """The refusal of a request to a run that is not open; `missing`: the shards without an owner.

    reason: why this process does not take them, where that will not change by itself.
    """
    if missing:
        detail = f"the run {run!r} waits for an owner of shard {', '.join(map(str, missing))}"
        return ShardUnavailable(detail if reason is None else f"{detail}: {reason}", missing=list(missing))
    if reason is not None:
        return ShardUnavailable(f"the run {run!r} cannot be opened: {reason}", missing=[])
    return ShardUnavailable(f"the shards of the run {run!r} are being opened", missing=[])
