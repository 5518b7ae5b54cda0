"""Services to measure, in processes of their own, and how much CPU they have used."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Service", "cpu_seconds", "running_service"]


@dataclass(frozen=True)
class Service:
    """A service process."""

    url: str
    pid: int


@contextmanager
def running_service(**settings: str) -> Iterator[Service]:
    """A service of its own on a free port, with an embedded store unless the settings name another."""
    with tempfile.TemporaryDirectory(prefix="freestep-bench-") as data_dir:
        command = [sys.executable, "-m", "freestep.cli", "serve", "--port", "0", "--data-dir", data_dir]
        variables = {f"FREESTEP_{name.upper()}": value for name, value in settings.items()}
        environment = {**os.environ, "FREESTEP_LOG_LEVEL": "warning", "PYTHONUNBUFFERED": "1", **variables}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stdout is not None
            yield Service(process.stdout.readline().split()[-1], process.pid)
        finally:
            process.terminate()
            process.wait()


def cpu_seconds(pid: int) -> float:
    """What a process and all its threads have used so far, to the nanosecond; Linux only.

    Its CPU-time clock, named as the kernel does (see clock_getcpuclockid(3)): the ticks of /proc/PID/stat are too
    coarse for a round of a few tens of milliseconds.
    """
    return time.clock_gettime(~pid << 3 | 2)
