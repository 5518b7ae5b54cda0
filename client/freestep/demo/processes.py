"""The demo's processes: started, listened to, and ended whatever happens."""

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
"""How long processes have to end in order, before they are killed."""


class Processes:
    """A context manager, at whose end its processes end. It belongs in the main thread.

    Each process has a session of its own, so that Ctrl-C reaches this one alone. While the context lasts a signal is
    only noted, and raised by `hear`: it never comes between a process and the record of it, nor cuts the ending short.
    """

    def __init__(self, log: Path) -> None:
        self._log = log.open("wb")
        self._heard: queue.SimpleQueue[tuple[str, str | None] | None] = queue.SimpleQueue()
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._handlers: dict[signal.Signals, Any] = {}

    def start(self, name: str, module: str, *arguments: str, heard: bool = False) -> None:
        """Starts a Python module. The first one is ended last. What it prints goes to the log, or to `hear`."""
        self._running[name] = process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if heard else self._log,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        if process.stdout is not None:
            threading.Thread(target=self._listen, args=(name, process.stdout), daemon=True).start()

    def hear(self, timeout: float) -> tuple[str, str | None]:
        """The next line printed and the name of its process; None for the line where the output ends.

        Raises KeyboardInterrupt after a signal, and TimeoutError.
        """
        try:
            heard = self._heard.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"nothing was heard for {timeout:g} s") from None
        if heard is None:
            raise KeyboardInterrupt
        return heard

    def kill(self, name: str) -> None:
        """SIGKILL: the process says goodbye to nobody."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def _listen(self, name: str, output: IO[str]) -> None:
        with output:
            for line in output:
                self._heard.put((name, line.rstrip("\n")))
        self._heard.put((name, None))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._heard.put(None)

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            # Whoever started this with a signal ignored, as nohup does, means it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._note)
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
        # Its whole group: a service that crashed leaves its store behind.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
