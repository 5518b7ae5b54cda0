"""The metrics that evaluators have reported, as a shard keeps them and a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Measured", "Reported", "with_measured"]

_KEPT = 64
"""Steps of a metric whose reports are kept, as in lua/report_metric.lua."""

Reported = Mapping[str, Mapping[int, float]]
"""Name -> step of the x -> value: of each metric the newest steps, oldest first."""


class Measured(NamedTuple):
    """A metric's value at the x of a step."""

    name: str
    step: int
    value: float


def with_measured(reported: Reported, measured: Measured) -> Reported:
    """What is kept after a report."""
    steps = {**reported.get(measured.name, {}), measured.step: measured.value}
    return {**reported, measured.name: dict(sorted(steps.items())[-_KEPT:])}
