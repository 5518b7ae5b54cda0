"""How pushes become updates: the named policies as values of one mechanism, and the damping of stale steps.

An update is made of `batch` pushes; a push is admitted while its staleness is at most `max_staleness`;
`distinct` says whether a worker contributes only once to an update. A worker that is more than `slack` pushes ahead of
the slowest live one waits before it may push (stale synchronous parallel). The scripts under lua/ decide by these
values, which is why they are strings here.
"""

from __future__ import annotations

from typing import NamedTuple

from freestep.api.models import AggregationSpec

__all__ = ["ADAPTIVE", "FRESH", "LIVE", "NONE", "Policy", "damping", "lateness"]

LIVE = "live"
"""As a batch: one push of every live worker."""
NONE = "none"
"""As a bound: any staleness is admitted."""
ADAPTIVE = "adaptive"
"""As a bound: four steps for each live worker, at least four."""
FRESH = "0"
"""As a bound: none."""

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
    """The values of the mechanism, as the scripts read them."""

    batch: str
    max_staleness: str
    distinct: bool
    slack: str = ""
    """Empty where nobody waits for others."""

    @classmethod
    def of(cls, spec: AggregationSpec) -> Policy:
        """The named policy's values, overruled by the fields that the spec gives."""
        batch, max_staleness, distinct = _POLICIES[spec.policy]
        if spec.batch is not None:
            batch = str(spec.batch)
        if spec.max_staleness is not None:
            max_staleness = str(spec.max_staleness)
        return cls(batch, max_staleness, distinct, "" if spec.slack is None else str(spec.slack))

    @property
    def groups(self) -> bool:
        """Whether an update may be made of more than one push."""
        return self.batch != "1"

    @property
    def concurrency(self) -> int:
        """How many gradients of one update may be on their way at once, at most four."""
        return 4 if self.batch == LIVE else min(int(self.batch), 4)


def damping(spec: AggregationSpec, staleness: int, live: int) -> float:
    """What a push's staleness τ leaves of the learning rate, in (0, 1].

    delay_adaptive: min(1, M/τ) with M live workers (arXiv 2206.07638); inverse_sqrt: 1/sqrt(1 + τ).
    """
    if spec.staleness_damping == "delay_adaptive":
        return min(1.0, max(live, 1) / max(staleness, 1))
    if spec.staleness_damping == "inverse_sqrt":
        return float((1 + staleness) ** -0.5)
    return 1.0


def lateness(spec: AggregationSpec, staleness: int) -> int:
    """A push's staleness τ where it bounds the learning rate, to 1/τ; 0 where it does not.

    fadas: it does above the threshold τ_c (FADAS, arXiv 2407.18365, its delay-adaptive learning rate).
    """
    threshold = spec.staleness_threshold
    return 0 if threshold is None or staleness <= threshold else staleness
