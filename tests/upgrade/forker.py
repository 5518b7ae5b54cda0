"""A process that has loaded the freestep that PYTHONPATH leads to, and forks `freestep` commands and scripts.

A line of JSON on its stdin asks it to start one, `{"arguments", "environment", "streams", "script"}`, or to reap one
that has ended, `{"reap": PID}`; it answers with a line: the pid, or the exit code. Its first line says where its
freestep is. What it has started dies with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import preloaded

_PR_SET_PDEATHSIG = 1


def main() -> None:
    _say(Path(preloaded.freestep.__file__).parents[1])
    for line in sys.stdin:
        asked = json.loads(line)
        if "reap" in asked:
            _say(os.waitstatus_to_exitcode(os.waitpid(asked["reap"], 0)[1]))
        elif (pid := os.fork()) == 0:
            _become(asked)
        else:
            _say(pid)


def _become(asked: Mapping[str, Any]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(asked["environment"])
    for number, path in enumerate(asked["streams"]):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False) for number, mode in enumerate("rww"))
    code: object = 0
    try:
        _run(asked["arguments"], asked["script"])
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by return: the parent's loop is none of this process's.
        os._exit(code if isinstance(code, int) else int(code is not None))


def _run(arguments: list[str], script: str) -> None:
    sys.argv = [script or "freestep", *arguments]
    if script:
        exec(compile(Path(script).read_text(), script, "exec"), {"__name__": "__main__", "__file__": script})
    else:
        preloaded.freestep.cli.main()


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
