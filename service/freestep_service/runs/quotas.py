"""What tokens may take of the service, and the refusals of those that have taken it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from math import ceil
from typing import Literal

from freestep.api.models import Lease
from freestep.errors import CoordinatorUnavailable, Overloaded, ProblemError
from freestep_service.coordination.quotas import Event, SharedQuotas
from freestep_service.domain.quotas import ByteRates, Quota
from freestep_service.domain.tokens import Token
from freestep_service.settings import Settings

__all__ = ["Quotas"]

_LASTING_S = 3600
"""Seconds after which to ask again where somebody has to delete a run."""
_LEASE_S = 10
"""Seconds after which to ask again for a lease: others may have ended."""


class Quotas:
    """The quotas of all tokens: runs, parameters and leases over all processes of a service, bytes at this one.

    A token that was made with a bound has it. Else those of scope push have the settings' defaults. Refusals are
    Overloaded, with `quota`, `limit` and `used`, and change nothing. clock: seconds.
    """

    def __init__(self, shared: SharedQuotas, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared = shared
        self._rates = ByteRates(clock)
        self._of_push = Quota(
            settings.push_max_runs,
            settings.push_max_parameters,
            settings.push_max_leases,
            settings.push_max_bytes_per_minute,
        )

    def _bound(self, token: Token, of: Literal["runs", "parameters", "leases", "bytes_per_minute"]) -> int | None:
        own: int | None = getattr(token.quota, of)
        default: int | None = getattr(self._of_push, of)
        return default if own is None and token.scope == "push" else own

    async def take_run(self, token: Token, run: str, elements: int) -> bool:
        """Counts a run that a token is about to create; whether it has a bound on these.

        elements: of the run's parameters. Raises Overloaded and CoordinatorUnavailable.
        """
        runs, parameters = self._bound(token, "runs"), self._bound(token, "parameters")
        if runs is None and parameters is None:
            return False
        full = await self._shared.take_run(token.id, run, elements, runs, parameters)
        if full is None:
            return True
        advice = ": delete runs that it has created"
        if full.what == "names":
            raise _refusal(token, "runs", runs, full.used, advice, _LASTING_S)
        wanted = f", and {elements} are wanted"
        raise _refusal(token, "parameters", parameters, full.used, wanted + advice, _LASTING_S)

    async def settle_run(self, token_id: str, run: str, event: Event, mark: str = "", elements: int = 0) -> None:
        """Counts a run that was made, or was made before; or counts it no more. mark: which one of its name."""
        await self._shared.settle_run(token_id, run, event, mark, elements)

    async def list_again(self, token_id: str, runs: Mapping[str, tuple[str, int]]) -> None:
        """Counts runs that are there where they are counted no more: run -> which one of its name, and its elements."""
        await self._shared.list_again(token_id, runs)

    async def grant(self, token: Token, run: str, worker: str, granting: Callable[[], Awaitable[Lease]]) -> Lease:
        """Counts a lease and has it granted. Raises Overloaded, CoordinatorUnavailable, and what `granting` raises."""
        limit = self._bound(token, "leases")
        if limit is None:
            return await granting()
        full = await self._shared.take_lease(token.id, run, worker, limit)
        if full is not None:
            raise _refusal(token, "leases", limit, full.used, ": release some, or wait until they end", _LEASE_S)
        try:
            lease = await granting()
        except ProblemError:
            with suppress(CoordinatorUnavailable):
                await self._shared.settle_lease(token.id, run, worker, "failed")
            raise
        await self._shared.settle_lease(token.id, run, worker, "made", lease.lease)
        return lease

    async def release_lease(self, token: Token, run: str, worker: str, lease: str) -> None:
        """Counts a lease no more, if it was one of the token's."""
        if self._bound(token, "leases") is not None:
            await self._shared.settle_lease(token.id, run, worker, "ended", lease)

    def bounds_bytes(self, token: Token) -> bool:
        """Whether a token may move only so many bytes."""
        return self._bound(token, "bytes_per_minute") is not None

    def admit_bytes(self, token: Token) -> None:
        """Raises Overloaded if a token has moved all the bytes that it may for now."""
        limit = self._bound(token, "bytes_per_minute")
        if limit is None:
            return
        if wait_s := self._rates.wait_s(token.id, limit):
            raise _refusal(token, "bytes_per_minute", limit, None, f": again in {ceil(wait_s)} s", ceil(wait_s))

    def spend_bytes(self, token: Token, size: int) -> None:
        """Counts bytes of tensors that a token moves."""
        limit = self._bound(token, "bytes_per_minute")
        if limit is not None:
            self._rates.spend(token.id, limit, size)


def _refusal(token: Token, quota: str, limit: int | None, used: int | None, advice: str, retry_s: int) -> Overloaded:
    taken = "all are used" if used is None else f"{used} are used"
    named = quota.replace("_", " ")
    refusal = Overloaded(
        f"the token {token.name!r} has a quota of {limit} {named}, and {taken}{advice}",
        quota=quota,
        limit=limit,
        **({} if used is None else {"used": used}),
    )
    refusal.retry_after = float(retry_s)
    return refusal
