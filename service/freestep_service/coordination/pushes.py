"""The admission and the commit of pushes.

A push is admitted and committed under its lease's fencing token, and under the token of each shard's owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freestep_service.coordination.run_scripts import RunScripts
from freestep_service.domain.records import Admission, Claim, Owner, Record, StagedPart

__all__ = ["RunPushes"]


class RunPushes:
    """The pushes of one run. `admit` and `commit` may raise Behind, Fenced and ShardUnavailable."""

    def __init__(self, scripts: RunScripts) -> None:
        self._scripts = scripts

    async def admit(self, claim: Claim, owner: Owner, sent: Sequence[str] = ()) -> Admission:
        """Renews the lease and decides what the claim can decide.

        sent: tickets of reads whose parts the shard has sent, as of `RunLog.reads_sent`.
        Raises Pending, Ahead and the refusals of lua/admit.lua.
        """
        status, *rest = await self._call("admit", claim, owner, *sent)
        match status:
            case "admitted":
                return Admission(attempt=rest[0])
            case "queued":
                return Admission(attempt=rest[0], queued=True)
            case "replay":
                return Admission(Record.from_json(rest[0]), replayed=True)
            case "dropped":
                return Admission(Record.from_json(rest[0]), evicted=tuple(rest[1:]))
        self._scripts.refuse(status, rest)

    async def precheck(self, claim: Claim) -> None:
        """Raises what `admit` would refuse a claim with, whichever shard it is for; renews nothing."""
        arguments = (claim.lease, claim.token, claim.step, claim.key, claim.fingerprint())
        keys = [self._scripts.lease_key(claim.lease)]
        status, *rest = await self._scripts.call("precheck_claim", *arguments, keys=keys)
        if status != "passed":
            self._scripts.refuse(status, rest)

    async def commit(
        self,
        claim: Claim,
        owner: Owner,
        part: StagedPart,
        largest_norm: float | None,
        attempt: str,
        wanted: str = "",
        *,
        after_update: bool = False,
    ) -> tuple[Record, list[str]] | None:
        """The policy's decision and the evicted idempotency keys; None while other shards have not staged their parts.

        part: what the shard has staged. largest_norm: of the whole gradient; None if any is allowed.
        attempt: the admission's.
        wanted: the point and dtype to answer with, as of the push's place in the log, or of its group's update.
        Raises Lost, LeaseExpired, EpochChanged and NonFiniteGradient (the norm over all shards is too large).
        """
        status, *rest = await self._call(
            "commit", claim, owner, *_staged(claim, part, largest_norm, wanted, after_update), attempt
        )
        if status == "staged":
            return None
        if status != "committed":
            self._scripts.refuse(status, rest)
        return Record.from_json(rest[0]), rest[1:]

    async def push(
        self, claim: Claim, owner: Owner, part: StagedPart, largest_norm: float | None, generation: int
    ) -> tuple[Record, list[str], bool]:
        """`admit` and `commit` in one call, for a run of one shard.

        generation: of the run's opening in which the body came. The decision, the evicted idempotency keys, and whether
        it was made before. Raises as both do, but for Pending.
        """
        status, *rest = await self._call("push", claim, owner, *_staged(claim, part, largest_norm), generation)
        if status not in ("committed", "dropped", "replay"):
            self._scripts.refuse(status, rest)
        return Record.from_json(rest[0]), rest[1:], status == "replay"

    async def discard(self, claim: Claim, attempt: str, shard: int, slug: str = "", detail: str = "") -> None:
        """Forgets a shard's part of an admitted push; with a slug, all shards refuse the push."""
        await self._scripts.call("discard_part", claim.key, attempt, shard, slug, detail)

    async def yield_slot(self, claim: Claim, attempt: str) -> None:
        """Gives the slot of a push whose sender is slow to the next in line."""
        await self._scripts.call("yield_slot", claim.key, attempt)

    async def _call(self, script: str, claim: Claim, owner: Owner, *more: str | int) -> list[Any]:
        return await self._scripts.call(
            script,
            claim.lease,
            claim.token,
            claim.step,
            claim.key,
            claim.fingerprint(),
            *owner.position,
            owner.shard,
            owner.token,
            *more,
            keys=[self._scripts.lease_key(claim.lease), self._scripts.window_key(claim.lease)],
        )


def _staged(
    claim: Claim, part: StagedPart, largest_norm: float | None, wanted: str = "", after_update: bool = False
) -> tuple[str | int, ...]:
    """What a call says of a part that is there, see lua/commit.lua."""
    largest = "" if largest_norm is None else repr(largest_norm)
    speed = "" if claim.speed is None else repr(claim.speed)
    elements = f"{part.begin}-{part.end}"
    return elements, part.digest, repr(part.norm), largest, wanted, int(after_update), speed, part.length
