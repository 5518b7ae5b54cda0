"""What tokens have, as far as their quotas count it: lists in Redis, which all processes of a service share.

A list is a claim and no count: when it is full, what is on it is looked for, and what is no more is taken off. So what
ends without being settled, with a process say, leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from freestep_service.coordination.run_scripts import RunScripts
from freestep_service.coordination.store import Store, reachable

__all__ = ["Event", "Full", "SharedQuotas"]

Event = Literal["made", "failed", "kept", "ended"]
"""What becomes of what was taken: it is made, or is not; it is there, made before; it ends."""

_KEPT_MS = 30 * 24 * 3600 * 1000
"""After which the list of a token that takes nothing, and has no runs, is dropped."""


class Full(NamedTuple):
    """What of a list is full, `names` or `weight`, and how much of that is used."""

    what: str
    used: int


class SharedQuotas:
    """The lists of all tokens. Methods raise CoordinatorUnavailable.

    runs_after_ms, leases_after_ms: after which an entry may be looked for; what makes it has come to its end by then.
    """

    def __init__(self, store: Store, runs_after_ms: int = 60_000, leases_after_ms: int = 10_000) -> None:
        self._store = store
        self._runs_after_ms = runs_after_ms
        self._leases_after_ms = leases_after_ms

    async def take_run(
        self, token: str, run: str, elements: int, most: int | None, heaviest: int | None
    ) -> Full | None:
        """Puts a run on a token's list, for its making; None if it is there now."""
        limits = (run, elements, _or_empty(most), _or_empty(heaviest), self._runs_after_ms)
        return await self._take(_key(token, "runs"), limits, lambda each: self._is_run_of(token, each))

    async def take_lease(self, token: str, run: str, worker: str, most: int) -> Full | None:
        """Puts a worker's lease, in place of an older one, on a token's list, for its making; None if it is there."""
        limits = (f"{run} {worker}", 1, most, "", self._leases_after_ms)
        return await self._take(_key(token, "leases"), limits, self._is_lease)

    async def settle_run(self, token: str, run: str, event: Event, mark: str = "", elements: int = 0) -> None:
        """Says what has become of a run; mark: which one of its name."""
        await self._settle(_key(token, "runs"), run, event, mark, elements, self._runs_after_ms)

    async def list_again(self, token: str, runs: Mapping[str, tuple[str, int]]) -> None:
        """Puts runs that are there on a token's list, where it lacks them: run -> its mark, and its parameters."""
        key = _key(token, "runs")
        with reachable():
            listed = await self._store.client.hmget(key, list(runs))
            # It is kept for as long as they are there.
            await self._store.client.pexpire(key, _KEPT_MS)
        for (run, (mark, elements)), entry in zip(runs.items(), listed, strict=True):
            if entry is None:
                await self.settle_run(token, run, "kept", mark, elements)

    async def settle_lease(self, token: str, run: str, worker: str, event: Event, lease: str = "") -> None:
        """Says what has become of a worker's lease."""
        await self._settle(_key(token, "leases"), f"{run} {worker}", event, lease, 1, self._leases_after_ms)

    async def _settle(self, key: str, *arguments: str | int) -> None:
        await self._store.run("quota_settle", [key], *arguments, _KEPT_MS)

    async def _take(
        self, key: str, limits: Sequence[str | int], is_there: Callable[[str], Awaitable[bool]]
    ) -> Full | None:
        found: list[str | int] = []
        seen: set[str] = set()
        while True:
            status, *rest = await self._store.run("quota_take", [key], *limits, _KEPT_MS, *found)
            if status == "taken":
                return None
            used, *due = rest
            unseen = [name for name in due if name not in seen]
            if not unseen:
                return Full(status, int(used))
            seen.update(unseen)
            found = []
            for name in unseen:
                found += [name, int(await is_there(name))]

    async def _is_run_of(self, token: str, run: str) -> bool:
        with reachable():
            creator: str | None = await self._store.client.hget(RunScripts(self._store, run).key("run"), "creator")
        return creator == token

    async def _is_lease(self, name: str) -> bool:
        run, _, worker = name.partition(" ")
        with reachable():
            return await self._store.client.zscore(RunScripts(self._store, run).key("leases"), worker) is not None


def _key(token: str, kind: str) -> str:
    return f"freestep:quota:{token}:{kind}"


def _or_empty(number: int | None) -> str | int:
    return "" if number is None else number
