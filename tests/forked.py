"""The `freestep` command in processes of their own that start at once.

Importing what a service needs, torch above all, takes a process seconds of CPU. These are forked from one that has
imported it and has done nothing else: it has one thread. How a process starts from nothing is tested in
service/test_start.py and demo/.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from freestep.cli import main

__all__ = ["freestep", "start"]

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["freestep.cli", "freestep_service.server"])


def freestep(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, in this process's environment and more."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        for stream in streams:
            stream.write_text(stdin if stream.name == "stdin" else "")
        process = start(*arguments, streams=streams, **environment)
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in streams[1:]))


def start(*arguments: str, streams: Sequence[Path] = (), **environment: str) -> BaseProcess:
    """The process of a command, in this process's environment and more; it does not outlive the tests.

    streams: the files that are its stdin, stdout and stderr, where it has not those of the tests.
    """
    process = _FORKS.Process(target=_run, args=(arguments, streams, {**os.environ, **environment}), daemon=True)
    process.start()
    return process


def _run(arguments: Sequence[str], streams: Sequence[Path], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    # multiprocessing has put /dev/null in its place.
    sys.stdin = open(0, closefd=False)
    sys.argv = ["freestep", *arguments]
    main()
