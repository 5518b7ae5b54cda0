"""The leases whose pushes this process has lately seen admitted.

The law of this file: it decides nothing. A claim that is expected to be admitted has its body received at once, so that
one call of Redis is enough for both; whether it is admitted Redis says in every case.
"""

from __future__ import annotations

from freestep_service.domain.records import Claim

__all__ = ["KnownLeases"]


class KnownLeases:
    """Those of one run, until anything happens here that may end one, or have a push refused: then none is known."""

    def __init__(self) -> None:
        self.forgotten = 0
        """How often they were forgotten."""
        self._epoch = 0
        self._tokens: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def note(self, claim: Claim, epoch: int, forgotten: int) -> None:
        """A push was admitted in an epoch, by an answer of Redis that was asked for when `forgotten` was as given."""
        if forgotten != self.forgotten:
            return
        if epoch != self._epoch:
            self._epoch, self._tokens = epoch, {}
        self._tokens[claim.lease] = claim.token

    def has(self, claim: Claim, epoch: int) -> bool:
        """Whether a push with the claim's lease and fencing token was admitted in this epoch."""
        return epoch == self._epoch and self._tokens.get(claim.lease) == claim.token

    def forget(self) -> None:
        """A lease was granted or has ended, or what pushes are admitted by was changed."""
        self.forgotten += 1
        self._tokens.clear()
