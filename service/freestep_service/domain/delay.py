"""The staleness that the next gradients of a run are expected to have.

It is a function of the log, so that all shards expect the same.

Under `auto`, and under `ahead` without a staleness of its own, a push of staleness s moves the expectation τ̂ to

    max(f, τ̂ + (s - τ̂) / (2 (1 + τ̂)))

f is the staleness of n equally fast workers. While one of them computes a gradient, the n - 1 others push, and `batch`
pushes make a step; the policy's `max_staleness` is an upper bound, since it drops what is staler. So τ̂ rises to f as
soon as workers join, and falls by at most half a step with each push after they leave. An expectation that is too large
costs some speed; one that is too small can make the run diverge.

Each push counts, in the order of the log, whether or not it completes an update. The step of a group is taken under the
expectation that its last push leaves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from freestep.api.delay import Ahead, Auto, DelayCorrection, NoCorrection, Steady
from freestep.api.hyperparameters import LEAST_CORRECTED, ScheduleFree
from freestep.api.models import RunSpec
from freestep_service.domain.aggregation import ADAPTIVE, FRESH, LIVE, NONE, Policy

__all__ = ["Expectation"]

_MEMORY = 2
"""The expectation averages over about this many times 1 + τ̂ pushes."""


class Expectation(NamedTuple):
    """The rule by which a run expects a staleness: its delay correction under its policy."""

    correction: DelayCorrection
    policy: Policy

    @classmethod
    def of(cls, spec: RunSpec) -> Expectation:
        return cls(_correction(spec), Policy.of(spec.aggregation))

    def after(self, expected: float, staleness: int, live: int) -> float:
        """The expectation, in steps, after a push of this staleness; `live`: the number of live workers then."""
        correction = self.correction
        if isinstance(correction, NoCorrection):
            return 0.0
        if isinstance(correction, Steady | Ahead) and correction.expected_staleness is not None:
            return correction.expected_staleness
        followed = expected + (staleness - expected) / (_MEMORY * (1 + expected))
        return max(self._foreseen(live), followed)

    def _foreseen(self, live: int) -> float:
        """The staleness, in steps, of so many equally fast workers."""
        if self.policy.batch == LIVE:
            return 0.0
        steps = math.ceil((max(live, 1) - 1) / int(self.policy.batch))
        bound = self.policy.max_staleness
        return float(steps if bound in (NONE, ADAPTIVE) else min(steps, int(bound)))


def _correction(spec: RunSpec) -> DelayCorrection:
    """The optimizer's correction; without one, `auto` if the policy admits stale gradients and β is large enough."""
    optimizer = spec.optimizer
    if not isinstance(optimizer, ScheduleFree):
        return NoCorrection()
    if optimizer.delay_correction is not None:
        return optimizer.delay_correction
    groups = [spec.hyperparameters(group) for group in spec.groups]
    betas = [each.beta for each in (optimizer, *groups) if isinstance(each, ScheduleFree)]
    admits_stale = Policy.of(spec.aggregation).max_staleness != FRESH
    return Auto() if admits_stale and min(betas) >= LEAST_CORRECTED else NoCorrection()
