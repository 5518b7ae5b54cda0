"""Curves in a project of trackio's. TRACKIO_DIR and the like hold as ever."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context
from typing import Any

import trackio

__all__ = ["Trackio", "opened"]


class Trackio:
    """A tracker that logs to a run of trackio's.

    Args:
        run: trackio's run.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds points, which trackio stores by itself."""
        self._run.log(dict(metrics), step=step)


@contextmanager
def opened(place: str, run: str, key: str) -> Iterator[Trackio]:
    """Begins a run of trackio's in a project, or goes on with it; waits in the end until all is stored."""
    # In a context of its own, since trackio ends the run before in one that has another. What the machine does that
    # follows a run says nothing of those that train.
    begun: Any = Context().run(
        trackio.init,
        project=place,
        name=f"{run}-{key}",
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    try:
        yield Trackio(begun)
    finally:
        begun.finish()
