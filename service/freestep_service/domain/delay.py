"""The staleness that a run's next gradients are expected to have: a function of its log, the same for all shards.

Where it follows what is seen (`auto`), a push of staleness s takes the expectation τ̂ to

    max(f, τ̂ + (s - τ̂) / (2 (1 + τ̂)))

f is what the live workers let expect. If each of n is computing a gradient, n - 1 other pushes come before it is its
turn, and `batch` of them make a step; where the policy drops what is staler than `max_staleness`, that is the most.
So τ̂ is at f at once when workers join, and is never less; when they leave it falls by half a step with each push, or
less. It is to be too large rather than too small: that costs some speed, and the other may cost the run.

Each push counts by itself, in the order of the log, whether or not it makes an update: those of a group move τ̂ one
after the other, and its step is taken under what the last one leaves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from freestep.api.delay import Auto, DelayCorrection, NoCorrection, Steady
from freestep.api.hyperparameters import LEAST_CORRECTED, ScheduleFree
from freestep.api.models import RunSpec
from freestep_service.domain.aggregation import ADAPTIVE, FRESH, LIVE, NONE, Policy

__all__ = ["Expectation"]

_MEMORY = 2
"""Over how many times 1 + τ̂ pushes what was seen is forgotten."""


class Expectation(NamedTuple):
    """How a run comes to expect a staleness."""

    correction: DelayCorrection
    policy: Policy

    @classmethod
    def of(cls, spec: RunSpec) -> Expectation:
        return cls(_correction(spec), Policy.of(spec.aggregation))

    def after(self, expected: float, staleness: int, live: int) -> float:
        """What is expected after a push of this staleness, when so many workers were live."""
        match self.correction:
            case Auto():
                followed = expected + (staleness - expected) / (_MEMORY * (1 + expected))
                return max(self._foreseen(live), followed)
            case Steady():
                return self.correction.expected_staleness
            case _:
                return 0.0

    def _foreseen(self, live: int) -> float:
        """The staleness, in steps, to which so many workers come that are equally fast."""
        if self.policy.batch == LIVE:
            return 0.0
        steps = math.ceil((max(live, 1) - 1) / int(self.policy.batch))
        bound = self.policy.max_staleness
        return float(steps if bound in (NONE, ADAPTIVE) else min(steps, int(bound)))


def _correction(spec: RunSpec) -> DelayCorrection:
    """What the run's optimizer says, or else its policy: `auto` where that admits stale gradients, and β allows it."""
    optimizer = spec.optimizer
    if not isinstance(optimizer, ScheduleFree):
        return NoCorrection()
    if optimizer.delay_correction is not None:
        return optimizer.delay_correction
    groups = [spec.hyperparameters(group) for group in spec.groups]
    betas = [each.beta for each in (optimizer, *groups) if isinstance(each, ScheduleFree)]
    admits_stale = Policy.of(spec.aggregation).max_staleness != FRESH
    return Auto() if admits_stale and min(betas) >= LEAST_CORRECTED else NoCorrection()
