"""What a run under a robust rule remembers of its workers' pushes: norms, outliers, and whom it has banned.

lua/commit.lua judges a push by it. Shards keep it too, as a function of the log, so that checkpoints hold it and a
Redis that lost its data gets it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["KEPT_NORMS", "MOST_NAMED", "Norm", "NormHistory"]

KEPT_NORMS, MOST_NAMED = 128, 1024
"""How many pushes are remembered, and of how many workers outliers are counted, as in lua/commit.lua."""


class Norm(NamedTuple):
    """The norm of a push, before clipping, and whether it was far beyond the usual."""

    worker: str
    norm: float
    is_outlier: bool = False


class NormHistory(NamedTuple):
    """norms: of the newest pushes in the log, oldest first. outliers, banned: worker -> how often."""

    norms: tuple[Norm, ...] = ()
    outliers: Mapping[str, int] = {}
    banned: Mapping[str, int] = {}

    @classmethod
    def of(cls, norms: Iterable[Sequence[Any]], outliers: Mapping[str, int], banned: Mapping[str, int]) -> NormHistory:
        """Of what `members` has made."""
        found = (Norm(worker, float(norm), is_outlier) for worker, norm, is_outlier in norms)
        return cls(tuple(found), dict(outliers), dict(banned))

    def after(self, push: Norm, ban_after: int | None) -> NormHistory:
        """What is remembered after one more push.

        ban_after: how many outliers among the remembered pushes have a worker banned; None for no number.
        """
        norms = (*self.norms, push)[-KEPT_NORMS:]
        if not push.is_outlier:
            return self._replace(norms=norms)
        outliers, banned = _counted(self.outliers, push.worker), self.banned
        found = sum(each.is_outlier and each.worker == push.worker for each in norms)
        if ban_after is not None and found >= ban_after:
            banned = _counted(banned, push.worker)
        return NormHistory(norms, outliers, banned)

    def members(self) -> dict[str, Any]:
        """As JSON members of a checkpoint's manifest; none where nothing is remembered."""
        if not self.norms:
            return {}
        norms = [list(each) for each in self.norms]
        return {"norms": norms, "outliers": dict(self.outliers), "banned": dict(self.banned)}

    def texts(self) -> tuple[str, str, str]:
        """Norms, outliers and bans as JSON, as Redis holds them: a norm is a text, since Lua would round it."""
        norms = [[each.worker, repr(each.norm), each.is_outlier] for each in self.norms]
        return json.dumps(norms), json.dumps(dict(self.outliers)), json.dumps(dict(self.banned))


def _counted(counts: Mapping[str, int], worker: str) -> Mapping[str, int]:
    if worker not in counts and len(counts) >= MOST_NAMED:
        return counts
    return {**counts, worker: counts.get(worker, 0) + 1}
