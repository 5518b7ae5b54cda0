"""The demo's processes, which end with it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

__all__ = ["Processes"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 15.0
"""Seconds that processes have to end after SIGTERM, before SIGKILL."""


class Processes:
    """Child processes that end with this context manager, which must be used in the main thread.

    Each process has a session of its own, so that Ctrl-C reaches this one only. Signals are queued and raised by
    `read_line`, so that they neither interrupt the start of a process nor the end of all.
    """

    def __init__(self, log: Path) -> None:
        self._log = log.open("wb")
        self._lines: queue.SimpleQueue[tuple[str, str | None] | None] = queue.SimpleQueue()
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._handlers: dict[signal.Signals, Any] = {}

    def start(self, name: str, module: str, *arguments: str, is_read: bool = False) -> None:
        """Starts a Python module; its output goes to the log, or to `read_line`. The first one is ended last."""
        self._running[name] = process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if is_read else self._log,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        if process.stdout is not None:
            threading.Thread(target=self._read_output, args=(name, process.stdout), daemon=True).start()

    def read_line(self, timeout: float) -> tuple[str, str | None]:
        """The next line of output and the name of its process; None instead of a line if the output has ended.

        Raises KeyboardInterrupt after a signal, and TimeoutError.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no output for {timeout:g} s") from None
        if line is None:
            raise KeyboardInterrupt
        return line

    def kill(self, name: str) -> None:
        """Kills a process with SIGKILL."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def end(self, *names: str) -> None:
        """Ends processes in order, by SIGTERM."""
        _end([self._running.pop(name) for name in names])

    def _read_output(self, name: str, output: IO[str]) -> None:
        with output:
            for line in output:
                self._lines.put((name, line.rstrip("\n")))
        self._lines.put((name, None))

    def _queue_signal(self, number: int, frame: FrameType | None) -> None:
        self._lines.put(None)

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            # A signal that is ignored, as nohup does, stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._queue_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = list(self._running.values())
        _end(processes[1:])
        _end(processes[:1])
        self._log.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        # Its whole group: a service that crashed may have left its store running.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
