"""The metrics that evaluators have reported, as shards and checkpoints hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["KEPT", "MOST_METRICS", "Measured", "Reported", "with_measured"]

KEPT, MOST_METRICS = 64, 64
"""How many steps of a metric are kept, and how many metrics a run may have, as in lua/report_metric.lua."""

Reported = Mapping[str, Mapping[int, float]]
"""Name of a metric -> step of the x that was measured -> value; the newest steps, oldest first."""


class Measured(NamedTuple):
    """The value of a metric, measured at the x of a step."""

    name: str
    step: int
    value: float


def with_measured(reported: Reported, measured: Measured) -> Reported:
    """Adds a report, and drops the oldest steps of its metric."""
    steps = {**reported.get(measured.name, {}), measured.step: measured.value}
    return {**reported, measured.name: dict(sorted(steps.items())[-KEPT:])}
