"""Processes that start at once: the `freestep` command, and scripts, forked from a process that is ready for both.

Importing what a service needs, torch above all, takes a process seconds of CPU, and so does loading the compiled
loops. These are forked from one that has done both (`preloaded`) and has a single thread. How a process starts from
nothing is tested in web/test_start.py and demo/.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import Pipe, forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from freestep.cli import main
from meanwhile import DEADLINE_S

__all__ = ["Script", "freestep", "join", "start", "start_program"]

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["preloaded"])


def freestep(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, in this process's environment, extended by `environment`."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        for stream in streams:
            stream.write_text(stdin if stream.name == "stdin" else "")
        process = start(*arguments, streams=streams, **environment)
        code = join(process)
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in streams[1:]))


def start(*arguments: str, streams: Sequence[Path] = (), network: str = "", **environment: str) -> BaseProcess:
    """Starts a command in this process's environment, extended by `environment`; it does not outlive the tests.

    streams: the files for its stdin, stdout and stderr; else it inherits those of the tests. network: the path of a
    network namespace to run in.
    """
    return _started(_command, arguments, streams, network, {**os.environ, **environment})


def start_program(program: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Starts `PATH/freestep ARGUMENTS` or `PATH/python SCRIPT ARGUMENTS`, as of an environment with this freestep.

    It runs in a folder, with this environment alone, and appends to a log; it does not outlive the tests. Raises
    CalledProcessError where the program itself does not start there.
    """
    subprocess.run([program[0], "--version"], cwd=folder, env=environment, check=True, capture_output=True)
    return _started(_program, Path(program[0]).name, program[1:], folder, log, dict(environment))


def _started(target: Callable[..., None], *arguments: object) -> BaseProcess:
    _start_forkserver()
    process = _FORKS.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def join(process: BaseProcess, deadline_s: float = DEADLINE_S) -> int:
    """Waits for the end of a process; returns its exit code. Raises TimeoutError after `deadline_s`."""
    process.join(deadline_s)
    if process.exitcode is None:
        raise TimeoutError(f"process {process.pid} has not ended after {deadline_s:g} s")
    return process.exitcode


class Script:
    """A Python script in a process of its own, with pipes to its stdin and from its stdout."""

    def __init__(self, source: str | Path, *arguments: str, network: str = "", **environment: str) -> None:
        """source: a file, or the text itself. network: the path of a network namespace to run in."""
        name, text = (str(source), source.read_text()) if isinstance(source, Path) else ("<script>", source)
        (stdin, self._stdin), (self._stdout, stdout) = Pipe(duplex=False), Pipe(duplex=False)
        self._read = b""
        with stdin, stdout:
            environment = {**os.environ, **environment}
            self._process = _started(_script, name, text, arguments, (stdin, stdout), network, environment)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def write_line(self, text: object) -> None:
        """Raises BrokenPipeError where the script has ended."""
        os.write(self._stdin.fileno(), f"{text}\n".encode())

    def close_stdin(self) -> None:
        self._stdin.close()

    def read_line(self) -> str:
        """The next line without its newline; "" at the end of the output. Raises TimeoutError after DEADLINE_S."""
        while b"\n" not in self._read:
            if not select.select([self._stdout], [], [], DEADLINE_S)[0]:
                raise TimeoutError(f"the script has written no line for {DEADLINE_S:g} s")
            more = os.read(self._stdout.fileno(), 1 << 16)
            if not more:
                break
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        return join(self._process, deadline_s)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self.wait()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kills it, if it has not ended."""
        if self._process.is_alive():
            self.kill()
        self._stdin.close()
        self._stdout.close()


def _start_forkserver() -> None:
    """Starts the process that all others are forked from, unless it runs."""
    with pytest.MonkeyPatch.context() as patch:
        # The forkserver does not inherit sys.path, and has to find `preloaded`.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        # OpenBLAS starts threads when numpy is imported; a process with threads must not be forked.
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        forkserver.ensure_running()


def _command(arguments: Sequence[str], streams: Sequence[Path], network: str, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        _redirect(number, path)
    _reopen_stdin()
    _enter(network)
    sys.argv = ["freestep", *arguments]
    main()


def _program(name: str, arguments: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number in (1, 2):
        _redirect(number, log)
    sys.stdout.reconfigure(line_buffering="PYTHONUNBUFFERED" in environment)  # type: ignore[union-attr]
    if name == "freestep":
        sys.argv = [name, *arguments]
        main()
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def _script(
    name: str,
    text: str,
    arguments: Sequence[str],
    streams: Sequence[Connection],
    network: str,
    environment: Mapping[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with ExitStack() as stack:
        for number, stream in enumerate(streams):
            os.dup2(stack.enter_context(stream).fileno(), number)
    _reopen_stdin()
    _enter(network)
    sys.argv = [name, *arguments]
    exec(compile(text, name, "exec"), {"__name__": "__main__", "__file__": name})


def _redirect(number: int, path: Path) -> None:
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(file, number)
    os.close(file)


def _enter(network: str) -> None:
    """Puts this process in a network namespace, if there is the path of one."""
    if network:
        with open(network) as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")


def _reopen_stdin() -> None:
    """multiprocessing has put /dev/null in its place."""
    sys.stdin = open(0, closefd=False)
