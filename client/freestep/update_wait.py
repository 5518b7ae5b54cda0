"""What a worker logs while an update waits for the pushes of others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from freestep.api.models import AggregationSpec, WorkerStatus
from freestep.errors import FreestepError

__all__ = ["FIRST_WAIT_S", "log_update_wait"]

logger = logging.getLogger("freestep")

FIRST_WAIT_S = 10.0
"""Seconds for which a push waits for its update before its worker says whom it waits for."""
_MOST_NAMES = 10


def log_update_wait(
    run: str, step: int, aggregation: AggregationSpec, workers: Callable[[], Sequence[WorkerStatus]]
) -> None:
    """Logs which live workers have pushed nothing for the update that makes a step.

    run: the run's name. workers: reads the live workers from the service; if that fails, nothing is logged.
    """
    try:
        live = workers()
    except FreestepError as error:
        logger.debug("it is not known whom the run %s waits for: %s", run, error)
        return
    missing = [worker.worker for worker in live if not worker.gathered]
    if aggregation.batch is not None:
        left = aggregation.batch - sum(worker.gathered for worker in live)
        if left > 0:
            logger.warning(
                "step %d of the run %s waits for %d more of the %d pushes that make it; %s",
                step, run, left, aggregation.batch, _without_one(missing),
            )  # fmt: skip
    elif missing:
        logger.warning("step %d of the run %s waits for the pushes of %s", step, run, _listed(missing))


def _without_one(missing: Sequence[str]) -> str:
    return f"live workers without one are {_listed(missing)}" if missing else "no other worker is live"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_MOST_NAMES]))
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"
