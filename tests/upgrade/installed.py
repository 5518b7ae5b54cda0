"""Versions of freestep as they are installed, each in a folder of its own, and processes of them.

A wheel is installed by pip without its dependencies, which are this environment's; PYTHONPATH chooses the version.
Processes are forked from one that has loaded that version, since loading it takes seconds of CPU.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness import wait_ready
from meanwhile import DEADLINE_S
from ports import free_port

__all__ = ["RELEASED", "Installed", "Served", "Started", "end_all", "install"]

_TESTS = Path(__file__).parents[1]
RELEASED = Path(__file__).with_name("freestep-0.1.0-py3-none-any.whl")
"""The wheel of the last released version; `__main__.py` says how it was made."""
_KEPT = _TESTS.parent / ".pytest_cache" / "installed"
_INSTALLED_AT = 1_600_000_000
"""What all files are dated, in seconds since 1970: numba keeps the machine code of files by their paths and dates."""


def install(wheel: Path, name: str, edit: Callable[[Path], object] = lambda folder: None) -> Path:
    """Installs a wheel alone into a folder, which goes on PYTHONPATH, unless it is there since an earlier run of tests.

    edit: changes what was installed.
    """
    folder, digest = _KEPT / name, sha256(wheel.read_bytes()).hexdigest()
    mark = folder / "digest"
    _KEPT.mkdir(parents=True, exist_ok=True)
    # Other processes of the same tests install the same.
    with (_KEPT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.exists() or mark.read_text() != digest:
            shutil.rmtree(folder, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
            subprocess.run([*pip, "--disable-pip-version-check", "--target", str(folder), str(wheel)], check=True)
            edit(folder)
            for path in folder.rglob("*.py"):
                os.utime(path, (_INSTALLED_AT, _INSTALLED_AT))
            mark.write_text(digest)
    return folder


class Installed:
    """A version in a folder, and the process that forks processes of it: a context manager, which ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        # OpenBLAS would start threads when numpy is imported; a process with threads must not be forked.
        environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{_TESTS}", "OPENBLAS_NUM_THREADS": "1"}
        self._forker = subprocess.Popen(
            [sys.executable, "-P", "-m", "upgrade.forker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip
        self._is_loaded = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forker.kill()
        self._forker.communicate()

    def start(self, *arguments: str, script: Path | None = None, **environment: str) -> Started:
        """Starts `freestep` with arguments, or a script, in this process's environment, extended by `environment`."""
        return Started(self, arguments, script, environment)

    def run(self, *arguments: str, script: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs one to its end."""
        with self.start(*arguments, script=script, **environment) as started:
            code = started.wait()
            return subprocess.CompletedProcess(arguments, code, started.stdout, started.stderr)

    def ask(self, question: dict[str, Any]) -> int:
        """What the forker answers."""
        with self._lock:
            assert self._forker.stdin is not None and self._forker.stdout is not None
            if not self._is_loaded:
                loaded = self._forker.stdout.readline().strip()
                assert loaded == str(self.folder), f"{loaded!r} was loaded, and not {self.folder}"
                self._is_loaded = True
            self._forker.stdin.write(json.dumps(question) + "\n")
            self._forker.stdin.flush()
            return int(self._forker.stdout.readline())


class Started:
    """A process of a version: a context manager, which kills it."""

    def __init__(
        self, version: Installed, arguments: Sequence[str], script: Path | None, environment: dict[str, str]
    ) -> None:
        self._version = version
        self._opened = ExitStack()
        folder = self._opened.enter_context(tempfile.TemporaryDirectory(prefix="freestep-upgrade-"))
        self._streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        os.mkfifo(self._streams[0])
        for stream in self._streams[1:]:
            stream.touch()
        self.code: int | None = None
        self.pid = version.ask(
            {
                "arguments": arguments,
                "script": "" if script is None else str(script),
                "environment": {**os.environ, **environment},
                "streams": [str(stream) for stream in self._streams],
            }
        )
        self._ended = os.pidfd_open(self.pid)
        self._opened.callback(os.close, self._ended)
        # Reading too: to open it does not wait then.
        self._stdin = os.open(self._streams[0], os.O_RDWR)
        self._opened.callback(os.close, self._stdin)

    @property
    def stdout(self) -> str:
        return self._streams[1].read_text()

    @property
    def stderr(self) -> str:
        return self._streams[2].read_text()

    def write_line(self, text: str) -> None:
        os.write(self._stdin, f"{text}\n".encode())

    def is_alive(self) -> bool:
        return not select.select([self._ended], [], [], 0)[0]

    def send_signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._ended, number)

    def wait(self) -> int:
        """Its exit code, once it has ended. Raises TimeoutError after DEADLINE_S."""
        if self.code is None:
            if not select.select([self._ended], [], [], DEADLINE_S)[0]:
                raise TimeoutError(f"process {self.pid} has not ended after {DEADLINE_S:g} s")
            self.code = self._version.ask({"reap": self.pid})
        return self.code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.code is None and self.is_alive():
            self.send_signal(signal.SIGKILL)
        self.wait()
        self._opened.close()


class Served:
    """`freestep serve` of one version after the other, on one port, with one data directory."""

    def __init__(self, data_dir: Path, **settings: Any) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._settings = {"port": self.port, "data_dir": data_dir, "checkpoint_seconds": 3600.0, **settings}
        self.started: Started | None = None

    def start(self, version: Installed, ready: int = 200) -> None:
        """Starts it in a version; returns when /readyz answers with the status `ready`."""
        self.started = version.start("serve", **self.environment)
        wait_ready(self.url, self._is_alive, status=ready)

    @property
    def environment(self) -> dict[str, str]:
        return {f"FREESTEP_{key.upper()}": str(value) for key, value in self._settings.items()}

    def _is_alive(self) -> bool:
        assert self.started is not None
        assert self.started.is_alive(), self.started.stderr
        return True

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it by a signal, if it runs."""
        if self.started is not None:
            if self.started.is_alive():
                self.started.send_signal(number)
            self.started.wait()
            self.started.__exit__(None, None, None)
            self.started = None


def end_all(services: Iterable[Served], number: signal.Signals = signal.SIGTERM) -> None:
    """Ends services at the same time."""
    running = [each for each in services if each.started is not None]
    for each in running:
        if each.started is not None and each.started.is_alive():
            each.started.send_signal(number)
    for each in running:
        each.end(number)
