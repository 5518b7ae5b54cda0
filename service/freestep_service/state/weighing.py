"""What a push's norm, its staleness and its samples leave of it.

The law of this file: no IO, no clock, no lock. It is told by the spec that is in force at the push's place in the log,
which only who takes the entries in their order knows.
"""

from __future__ import annotations

from dataclasses import replace

from freestep.api.models import RunSpec
from freestep_service.domain.aggregation import damping, lateness
from freestep_service.state.log import Entry

__all__ = ["LARGEST_NORM", "weighed"]

LARGEST_NORM = 2.0**63
"""Of what a step takes: a moving average of squares that has once overflowed fp32 stays infinite."""


def weighed(spec: RunSpec, entry: Entry) -> Entry:
    """A push with what its norm, its staleness and its samples leave of it, under the spec in force at its place."""
    assert entry.norm is not None
    limit, norm, aggregation = spec.optimizer.max_grad_norm, entry.norm, spec.aggregation
    # A push that is longer was let in while there was a limit, or under one that is larger.
    scale = 1.0 if norm <= LARGEST_NORM else LARGEST_NORM / norm
    if limit is not None:
        # As torch.nn.utils.clip_grad_norm_.
        scale = min(scale, limit / (norm + 1e-6))
    bound = entry.bound
    return replace(
        entry,
        # Under a robust rule nobody weighs more because he says so.
        weight=1.0 if entry.samples is None or aggregation.robust != "none" else entry.samples,
        scale=scale if bound is None or norm <= bound else min(scale, bound / norm),
        damping=damping(aggregation, entry.staleness, entry.live),
        lateness=lateness(aggregation, entry.staleness),
        is_weighed=True,
    )
