"""Aggregation policies as values of one mechanism, and the damping of stale steps.

An update is made of `batch` pushes. A push is admitted if its staleness is at most `max_staleness`. Under `distinct` a
worker contributes at most once to an update. A worker that is more than `slack` pushes ahead of the slowest live worker
waits before it may push (stale synchronous parallel). The values are strings, since the scripts of coordination/lua
read them. A robust rule that compares the pushes of an update keeps them apart, and takes one of each worker.
"""

from __future__ import annotations

import json
import math
from typing import NamedTuple

from freestep.api.models import AggregationSpec
from freestep.wire.encoding import ENCODINGS

__all__ = ["ADAPTIVE", "FRESH", "LIVE", "NONE", "Policy", "accepted_encodings", "damping", "lateness"]

LIVE = "live"
"""A batch: one push of every live worker."""
NONE = "none"
"""A bound on staleness: none."""
ADAPTIVE = "adaptive"
"""A bound on staleness: four steps for each live worker, at least four."""
FRESH = "0"
"""A bound on staleness: no step."""

_CLIP_FACTOR, _OUTLIER_FACTOR = 1.0, 10.0

_POLICIES: dict[str, tuple[str, str, bool]] = {
    "async": ("1", NONE, False),
    "ringmaster": ("1", ADAPTIVE, False),
    "sync": (LIVE, FRESH, True),
    "quorum": ("", FRESH, True),
    "buffered": ("", NONE, False),
    "rennala": ("", FRESH, False),
    "ssp": ("1", NONE, False),
}


class Policy(NamedTuple):
    """The values of a policy."""

    batch: str
    max_staleness: str
    distinct: bool
    slack: str = ""
    """Empty if no worker waits for others."""
    bounds: str = ""
    """What the commit bounds under a robust rule, as JSON: `outlier`, `clip`, `ban_after` and `max_batch`, as far as
    they are set. Empty without such a rule."""
    kept: int = 0
    """How many pushes of an update are kept apart, at most."""

    @classmethod
    def of(cls, spec: AggregationSpec) -> Policy:
        """The values of the named policy, except for those that the spec sets."""
        batch, max_staleness, distinct = _POLICIES[spec.policy]
        if spec.batch is not None:
            batch = str(spec.batch)
        if spec.max_staleness is not None:
            max_staleness = str(spec.max_staleness)
        slack = "" if spec.slack is None else str(spec.slack)
        kept = spec.most_pushes or 0 if spec.compares else 0
        return cls(batch, max_staleness, distinct or spec.compares, slack, _bounds(spec), kept)

    def values(self) -> tuple[str | int, ...]:
        """What scripts need of it, in the order in which they take it."""
        return self.batch, self.max_staleness, int(self.distinct), self.slack, self.bounds

    def staleness_bound(self, live: int) -> float:
        """How stale a push may be that is admitted, in steps, with so many live workers; see lua/_prelude.lua."""
        if self.max_staleness == NONE:
            return math.inf
        return 4 * max(live, 1) if self.max_staleness == ADAPTIVE else int(self.max_staleness)

    @property
    def groups(self) -> bool:
        """Whether an update may be made of more than one push."""
        return self.batch != "1"

    @property
    def gathered_vectors(self) -> int:
        """How many vectors the pushes of an update are gathered in, at most."""
        return self.kept or int(self.groups)

    @property
    def concurrency(self) -> int:
        """How many gradients of one update may be received at the same time, at most four."""
        return 4 if self.batch == LIVE else min(int(self.batch), 4)


def _bounds(spec: AggregationSpec) -> str:
    if spec.robust == "none":
        return ""
    bounds = {
        "outlier": spec.outlier_factor or _OUTLIER_FACTOR,
        "clip": (spec.clip_factor or _CLIP_FACTOR) if spec.robust == "clip" else None,
        "ban_after": spec.ban_after,
        "max_batch": spec.max_batch,
    }
    return json.dumps({name: value for name, value in bounds.items() if value is not None})


def accepted_encodings(spec: AggregationSpec) -> tuple[str, ...]:
    """The encodings of pushes that the rule can be applied to: of top-k the median of a coordinate is 0 as a rule."""
    by_coordinate = spec.robust in ("trimmed_mean", "coordinate_median")
    return tuple(name for name in ENCODINGS if name != "topk" or not by_coordinate)


def damping(spec: AggregationSpec, staleness: int, live: int) -> float:
    """The factor in (0, 1] by which a push of staleness τ, in steps, multiplies the learning rate.

    delay_adaptive: min(1, M/τ) with M live workers (arXiv 2206.07638); inverse_sqrt: 1/sqrt(1 + τ); else 1.
    """
    if spec.staleness_damping == "delay_adaptive":
        return min(1.0, max(live, 1) / max(staleness, 1))
    if spec.staleness_damping == "inverse_sqrt":
        return float((1 + staleness) ** -0.5)
    return 1.0


def lateness(spec: AggregationSpec, staleness: int) -> int:
    """The staleness τ of a push if it bounds the learning rate, to 1/τ, else 0.

    fadas: it does above the threshold τ_c (the delay-adaptive learning rate of FADAS, arXiv 2407.18365).
    """
    threshold = spec.staleness_threshold
    return 0 if threshold is None or staleness <= threshold else staleness
