"""A real service for an experiment, in processes of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from freestep.demo.processes import Processes

__all__ = ["SILENCE_S", "Service", "serving"]

SILENCE_S = 300.0
"""With nothing heard for so long, something is broken."""


@dataclass(frozen=True)
class Service:
    """Where it is, the processes that end with it, and the log that they write."""

    url: str
    processes: Processes
    log: Path


@contextmanager
def serving() -> Iterator[Service]:
    """A service on a free port, with a data directory that goes with it; in the main thread only."""
    with tempfile.TemporaryDirectory(prefix="freestep-lab-") as folder:
        log = Path(folder, "log")
        with Processes(log) as processes:
            processes.start("service", "freestep.cli", "serve", "--port", "0", "--data-dir", folder, is_read=True)
            # The first line of its output names the port that it found.
            _, line = processes.read_line(SILENCE_S)
            if line is None:
                raise RuntimeError(f"the service ended: {log.read_text()}")
            yield Service(line.split()[-1], processes, log)
