"""Processes that are started again at once when they end, until all are to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["Supervisor"]

_GRACE_S = 20.0


class Supervisor:
    """Keeps commands of this interpreter running; their output goes to one file."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self._log = log
        self._environment = {**os.environ, **environment}
        self._lock = threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._keepers: list[threading.Thread] = []
        self._is_ending = False
        self.failures: list[str] = []
        """Processes that ended by themselves: whoever reads a run's figures has to know of them."""

    def keep(self, number: int, arguments: Sequence[str], before: Sequence[str] = ()) -> None:
        """Starts a command, and again whenever it ends. before: a command that starts the interpreter, if any."""
        command = [*before, sys.executable, *arguments]
        self._start(number, command)
        keeper = threading.Thread(target=self._keep, args=(number, command), daemon=True)
        self._keepers.append(keeper)
        keeper.start()

    def _start(self, number: int, command: Sequence[str]) -> bool:
        with self._lock:
            if self._is_ending:
                return False
            with self._log.open("ab") as log:
                self._running[number] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment,
                    start_new_session=True,
                )
            return True

    def _keep(self, number: int, command: Sequence[str]) -> None:
        while True:
            code = self._running[number].wait()
            if code != -signal.SIGKILL and not self._is_ending:
                self.failures.append(f"process {number} ended with {code}")
                # Not as fast as it fails, which would leave the others no time.
                time.sleep(1.0)
            if not self._start(number, command):
                return

    def kill(self, number: int) -> None:
        """SIGKILL."""
        self._running[number].kill()

    def wait(self, number: int) -> None:
        """Waits for a process to end by itself, for good."""
        with self._lock:
            self._is_ending = True
        with suppress(subprocess.TimeoutExpired):
            self._running[number].wait(_GRACE_S)

    def end(self, numbers: Sequence[int], at_once: Collection[int] = ()) -> None:
        """SIGTERM, and SIGKILL to what is left of their sessions after a while; `at_once` get SIGKILL alone."""
        with self._lock:
            self._is_ending = True
        for number in numbers:
            if number in at_once:
                self._running[number].kill()
            else:
                self._running[number].terminate()
        for number in numbers:
            with suppress(subprocess.TimeoutExpired):
                self._running[number].wait(_GRACE_S)
            with suppress(ProcessLookupError):
                os.killpg(self._running[number].pid, signal.SIGKILL)
