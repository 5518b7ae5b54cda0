"""How SIGTERM ends a worker's script: as Ctrl-C does, but without a traceback, and with exit code 143.

The law of this file: the first SIGTERM raises SystemExit in the main thread, so that `with` and `finally` blocks run,
and later ones do nothing, so that these run to their end. From then on no request is repeated, and none waits for long.
An action that SIGTERM has already is never replaced, and a forked child has the default one from its first moment.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from _thread import start_new_thread
from types import FrameType
from typing import NoReturn

from freestep.errors import InvalidSetting

__all__ = ["PATIENCE_S", "hold_s", "is_leaving", "leave_if_asked", "leave_on_sigterm", "raise_if_leaving"]

logger = logging.getLogger("freestep")

PATIENCE_S = 5.0
"""Seconds for which a process that leaves waits for a request. Docker kills it 10 s after SIGTERM, Kubernetes 30 s."""

_HOLD_S = 1.0
"""The most seconds for which it asks the service to hold an answer: the answer has to come within PATIENCE_S."""

_VARIABLE = "FREESTEP_LEAVE_ON_SIGTERM"
_EXIT_CODE = 128 + signal.SIGTERM

_is_leaving = False
_has_raised = False
"""Whether SystemExit has been raised for it."""
_is_told = False


class _Fork(threading.local):
    """A fork under way in this thread."""

    blocks = False
    """Whether SIGTERM is blocked for it."""


_fork = _Fork()


def leave_on_sigterm() -> None:
    """Has SIGTERM end this process as Ctrl-C does, but without a traceback, and with exit code 143.

    SystemExit is raised in the main thread: `with` and `finally` blocks run, and leases are released, those of
    optimizers that no `with` block closes too; units of data that are out are given back with them. A push under way is
    abandoned: it counts once or not at all. Once the signal has come, requests are not repeated, and wait for 5 seconds
    at most. If something catches the exception, the next `step` raises it again, and so does the next point of a
    `watch`. Later SIGTERMs change nothing.

    Call it in the main thread, as early as you like: process 1 of a container ignores SIGTERM until then. With
    FREESTEP_LEAVE_ON_SIGTERM=1 in the environment, an optimizer calls it when it is made. It does nothing, and the log
    says so once, in other threads, and where SIGTERM has another than its default action: a handler of your own, or of
    a library that stops training by it. Forked children, as a DataLoader's workers are, have the default action.
    """
    if threading.current_thread() is not threading.main_thread():
        _tell(logging.WARNING, "SIGTERM will not end this process in order: leave_on_sigterm() needs the main thread")
        return
    present = signal.getsignal(signal.SIGTERM)
    if present is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _leave)
    elif present is not _leave:
        _tell(logging.INFO, f"SIGTERM is handled already, and leave_on_sigterm() does not replace that: {present}")


def leave_if_asked() -> None:
    """Calls `leave_on_sigterm` if the environment says so. Raises InvalidSetting if it says neither 0 nor 1."""
    value = os.environ.get(_VARIABLE) or "0"
    if value not in ("0", "1"):
        raise InvalidSetting(f"{_VARIABLE} must be 0 or 1, not {value!r}")
    if value == "1":
        leave_on_sigterm()


def is_leaving() -> bool:
    """Whether SIGTERM has come."""
    return _is_leaving


def hold_s(wait: float) -> float:
    """Seconds for which the service is asked to hold an answer, instead of `wait`: fewer once SIGTERM has come."""
    return min(wait, _HOLD_S) if _is_leaving else wait


def raise_if_leaving() -> None:
    """Raises SystemExit again, where SIGTERM has come and something has caught it: a `__del__`, for example."""
    if _is_leaving:
        _raise()


def _leave(number: int, frame: FrameType | None) -> None:
    global _is_leaving
    _is_leaving = True
    # What is raised while Python forks is lost, and may leave logging's lock locked.
    if not (_has_raised or _fork.blocks):
        _raise()


def _raise() -> NoReturn:
    global _has_raised
    _has_raised = True
    raise SystemExit(_EXIT_CODE)


def _tell(level: int, message: str) -> None:
    global _is_told
    if not _is_told:
        _is_told = True
        logger.log(level, message)


def _before_fork() -> None:
    """Blocks SIGTERM: what a child notes of a signal is lost while it still has this file's handler."""
    is_blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if signal.getsignal(signal.SIGTERM) is _leave and not is_blocked:
        _fork.blocks = True
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _fork.blocks = False


def _after_fork_in_parent() -> None:
    if _fork.blocks:
        _unblock()
        if _is_leaving and not _has_raised:
            # It came while Python forked. `threading.Thread.start` would wait, and the signal would come here.
            start_new_thread(os.kill, (os.getpid(), signal.SIGTERM))


def _after_fork_in_child() -> None:
    global _is_leaving, _has_raised
    _is_leaving = _has_raised = False
    if signal.getsignal(signal.SIGTERM) is _leave:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _fork.blocks:
        _unblock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
