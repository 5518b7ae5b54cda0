"""The methods that race, and what each is tuned over."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from benchmarks.race.worlds import World

__all__ = ["METHODS", "TRIES", "Method"]

_GRID = (0.005, 0.01, 0.02)
"""Learning rates of AdamW Schedule-Free, whose default, half the first, is too small for races this short."""
_INNER_GRID = (0.002, 0.004, 0.008)
"""Learning rates of AdamW, whose default is half the first."""
TRIES = len(_GRID) + 1
"""Rates that are tried of each method."""
EVERY = 20
"""Local steps to a round."""


@dataclass(frozen=True)
class Method:
    """How workers train together.

    says: what it is. kind: which processes it consists of. grid: learning rates that it is tuned over, none where it
    takes those that another method was tuned to, `tuned_as`. options: of freestep's optimizer. inner: whether workers
    take local steps.
    """

    name: str
    says: str
    kind: Literal["ddp", "torchrun", "torchft", "freestep"]
    grid: tuple[float, ...] = ()
    tuned_as: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    inner: bool = False

    def races_in(self, world: World) -> bool:
        """Whether it differs in this world from a method that is there anyway, and can be run in it."""
        return {
            "ddp": world.kill_mean is None,
            "torchrun": world.kill_mean is not None,
            "torchft": world.kill_mean is not None or world.name == "equal",
            "freestep": True,
        }[self.kind]

    def missing(self) -> str | None:
        """Why it cannot be run on this machine; None if it can."""
        if self.kind == "torchft" and find_spec("torchft") is None:
            return "the package torchft is not installed (pip install --no-deps torchft==0.2.0)"
        return None


METHODS = {
    method.name: method
    for method in (
        Method("ddp", "DDP", "ddp", _GRID),
        Method("torchrun", "DDP, torchrun", "torchrun", tuned_as="ddp"),
        Method("torchft", "DDP, torchft", "torchft", tuned_as="ddp"),
        Method("sync", "freestep `sync`", "freestep", tuned_as="ddp", options=(("aggregation", "sync"),)),
        Method("ringmaster", "freestep `ringmaster`", "freestep", _GRID),
        Method(
            "local",
            "freestep LocalSteps",
            "freestep",
            _INNER_GRID,
            options=(("algorithm", "sgd_schedule_free"), ("lr", 4.0)),
            inner=True,
        ),
        Method("diloco", "freestep DiLoCo", "freestep", _INNER_GRID, inner=True),
    )
}
