"""Curves in a project of Weights & Biases. WANDB_API_KEY, WANDB_MODE=offline and the like hold as ever."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import wandb

__all__ = ["WeightsAndBiases", "opened"]

_STEP = "freestep_step"
"""W&B's own step may not go back, as a run does that returns to a checkpoint; so the run's is a metric of its own."""


class WeightsAndBiases:
    """A tracker that logs to a run of W&B's.

    Args:
        run: W&B's run.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric(_STEP, hidden=True)
        run.define_metric("*", step_metric=_STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds points, which wandb sends by itself."""
        self._run.log({**metrics, _STEP: step})


@contextmanager
def opened(place: str, run: str, key: str) -> Iterator[WeightsAndBiases]:
    """Begins a run of W&B's in a project, or goes on with it; waits in the end until all is sent."""
    # What the machine does that follows a run says nothing of those that train.
    quiet = wandb.Settings(console="off", x_disable_stats=True, disable_git=True, save_code=False)
    # A process may have runs in several projects: without create_new the second is the first one again, and two of one
    # ID are refused.
    begun = wandb.init(
        project=place, name=run, id=f"{key}-{place}", resume="allow", reinit="create_new", settings=quiet
    )
    try:
        yield WeightsAndBiases(begun)
    finally:
        begun.finish()
