"""Services to measure, in processes of their own, and how much CPU and memory they have used."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

__all__ = ["Service", "cpu_seconds", "running_service", "service_in"]

_READY_S = 60.0


@dataclass(frozen=True)
class Service:
    """A service process."""

    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """What it and the store that it started have used so far."""
        return sum(map(cpu_seconds, [self.pid, *_children(self.pid)]))

    def peak_memory(self) -> int:
        """Bytes: the most that it has had in memory so far, without its store."""
        (line,) = (line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if "VmHWM" in line)
        return 1024 * int(line.split()[1])


@contextmanager
def running_service(**settings: str) -> Iterator[Service]:
    """A service of its own on a free port, ready; with an embedded store unless the settings name another."""
    with tempfile.TemporaryDirectory(prefix="freestep-bench-") as data_dir, service_in(data_dir, **settings) as service:
        yield service


@contextmanager
def service_in(data_dir: str, **settings: str) -> Iterator[Service]:
    """... with its data in a directory, where it goes on from what another has left."""
    command = [sys.executable, "-m", "freestep.cli", "serve", "--port", "0", "--data-dir", data_dir]
    # What is measured is how services serve workers elsewhere, unless it says otherwise.
    settings = {"shared_memory": "false", **settings}
    variables = {f"FREESTEP_{name.upper()}": value for name, value in settings.items()}
    environment = {**os.environ, "FREESTEP_LOG_LEVEL": "warning", "PYTHONUNBUFFERED": "1", **variables}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        service = Service(process.stdout.readline().split()[-1], process.pid)
        _wait_ready(service, process, ssl.create_default_context(cafile=settings.get("ca_certs")))
        yield service
    finally:
        process.terminate()
        process.wait()


def _wait_ready(service: Service, process: subprocess.Popen[str], trusted: ssl.SSLContext) -> None:
    deadline = time.monotonic() + _READY_S
    with httpx.Client(base_url=service.url, verify=trusted) as client:
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if client.get("/readyz").is_success:
                    return
            time.sleep(0.01)
    raise RuntimeError("the service does not get ready")


def cpu_seconds(pid: int) -> float:
    """What a process and all its threads have used so far, to the nanosecond; Linux only.

    Its CPU-time clock, named as the kernel does (see clock_getcpuclockid(3)): the ticks of /proc/PID/stat are too
    coarse for a round of a few tens of milliseconds.
    """
    return time.clock_gettime(~pid << 3 | 2)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
