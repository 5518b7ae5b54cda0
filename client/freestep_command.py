"""The entry of the `freestep` command, which imports nothing itself.

What the command needs takes seconds to import, torch above all; a Ctrl-C meanwhile would come out of the midst of it as
a traceback. It is outside the package `freestep`, whose import is just that.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["importing", "main"]

_INTERRUPTED = 130
"""128 + SIGINT, as a shell would say it."""


def main() -> None:
    """Runs the command: `freestep.cli`."""
    with importing():
        from freestep.cli import main as run
    run()


@contextmanager
def importing() -> Iterator[None]:
    """For imports that take seconds.

    Meanwhile a Ctrl-C ends the process at once and silently: there is nothing yet to be put in order. Nor does the
    collector go through what is being made, a tenth of the time, or ever after: it stays.
    """
    before = signal.getsignal(signal.SIGINT)
    # Who runs it in the background may have it ignore the signal.
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
