"""A region's run is moved to where its next round begins, once for each round.

The law of this file: the state that is imported has the number of its round, so a run tells what it was moved to last,
also when it goes back to a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from freestep.answers import Pulled
from freestep.api.models import RunStatus
from freestep.errors import EpochChanged, StepNotReached
from freestep.flat import Flat
from freestep.region_place import Place
from freestep.run import Run
from freestep.run_state import RunState

__all__ = ["ROUND_METRIC", "move", "round_of"]

logger = logging.getLogger("freestep")

ROUND_METRIC = "region_round"
"""The metric of a region's run that has the number of the round that it was moved to."""

_ATTEMPTS, _UPDATE_S = 20, 10.0
"""To pause at a moment when no push is gathered; and seconds to wait for the update that comes before one."""


def round_of(status: RunStatus) -> int:
    """The round that a run was moved to last, 0 if it never was."""
    metric = status.metrics.get(ROUND_METRIC)
    return 0 if metric is None else int(metric.value)


def move(run: Run, place: Place, scratch: Flat, save: Callable[[Place], Place]) -> Place:
    """Moves a run, unless it was, such that `place.sent` becomes `place.base`; the place where its round begins.

    Where the place says `whole`, or the run has gone back since `sent` was read, its y becomes `place.base`. A run that
    somebody else has paused stays so. After an error the run is resumed as well, and moved by the next call.

    scratch: a vector of the run's, which is overwritten. save: writes a place.
    """
    try:
        while round_of(status := _status(run, place)) != place.round:
            if place.was_paused is None:
                place = save(place.after(was_paused=status.control.paused))
            _pause(run, scratch, is_for_good=bool(place.was_paused))
            state = run.export_state()
            if state.epoch != place.run_epoch and not place.whole:
                place = save(place.after(whole=True))
            _translate(state, place, scratch)
            # Somebody may resume the run before it has the state: then this is done again.
            with suppress(EpochChanged):
                run.import_state(state, replace=True, at=Pulled(state.epoch, state.step))
    finally:
        if place.was_paused is False:
            run.resume()
    return place.moved(status.epoch, status.metrics[ROUND_METRIC].step)


def _status(run: Run, place: Place) -> RunStatus:
    status = run.status()
    place.require_runs(run=status)
    return status


def _translate(state: RunState, place: Place, scratch: Flat) -> None:
    if place.sent is None or place.whole:
        scratch.fill(state.buffers["y"])
    else:
        scratch.vector.copy_(place.sent)
    scratch.vector.neg_().add_(place.base)
    state.translate(scratch)
    state.metrics = {**state.metrics, ROUND_METRIC: {state.step: float(place.round)}}


def _pause(run: Run, scratch: Flat, *, is_for_good: bool) -> None:
    """Pauses a run where no push is gathered for an update, if that can be: a state has none of them."""
    for left in range(_ATTEMPTS, 0, -1):
        run.pause()
        status = run.status()
        gathered = sum(each.gathered for each in status.workers)
        if not gathered:
            return
        if is_for_good or left == 1:
            logger.warning("%d pushes to the run %s, gathered for an update, are lost in its move", gathered, run.name)
            return
        run.resume()
        with suppress(StepNotReached):
            run.pull_into(scratch, "y", min_step=status.step + 1, wait=_UPDATE_S)
