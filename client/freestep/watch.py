"""New points of a run as they come, for evaluators."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from freestep.answers import Snapshot
from freestep.errors import RunNotFound, RunNotInitialized, StepNotReached
from freestep.leaving import raise_if_leaving

if TYPE_CHECKING:
    from freestep.flat import Flat

__all__ = ["watch"]

_POLL_S = 20.0
"""Seconds for which one request waits, less than the 30 s or more after which gateways give up."""
_PAUSE_S = 0.5
"""Seconds between two looks at a run that has no weights yet."""


def watch(
    new_flat: Callable[[], Flat],
    pull_into: Callable[[Flat, int, float], Snapshot],
    read_id: Callable[[], str | None],
    every: int,
    min_step: int,
) -> Iterator[tuple[int, Snapshot]]:
    """Yields steps and points, as `Run.watch` says.

    new_flat: memory for a point. pull_into(flat, min_step, wait): pulls a point into it, as `Run.pull_into` does.
    read_id: the run's id, which tells a run that went back from another one of its name.

    The service sends a point only if it is of `min_step` or later, so nothing is sent twice. A run that went back to
    an earlier step may not reach that step for long: the refusal names the run's epoch, and comes at once where the
    epoch changes during the wait. One that has changed before is noticed by a request that does not wait.
    """
    flat, epoch, run_id, wait = new_flat(), None, read_id(), 0.0
    while True:
        raise_if_leaving()
        try:
            x = pull_into(flat, min_step, wait)
        except RunNotInitialized:
            time.sleep(_PAUSE_S)
        except StepNotReached as refusal:
            if epoch is None or refusal.extensions.get("epoch", epoch) == epoch:
                wait = _POLL_S
            else:
                min_step, wait = 0, 0.0
        else:
            if epoch not in (None, x.epoch) and read_id() != run_id:
                raise RunNotFound(f"the run {x.run!r} was deleted, and another run has its name now")
            epoch, min_step, wait = x.epoch, x.step + every, 0.0
            yield x.step, x
            # The caller may keep these tensors, or have them freed.
            del x
            flat = new_flat()
