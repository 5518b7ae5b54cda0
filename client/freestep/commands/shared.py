"""What commands share: options, the client, and how they end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from freestep.client import Client
from freestep.terminal import print_error

__all__ = [
    "INTERRUPTED",
    "WHERE_TOKENS_ARE_GIVEN",
    "Json",
    "OfCheckpoint",
    "RunName",
    "Token",
    "Url",
    "connect",
    "fail",
    "or_dash",
    "slow_imports",
    "steps_or_dash",
]

Url = Annotated[str, typer.Option(envvar="FREESTEP_URL", help="The service's URL.")]
Token = Annotated[str | None, typer.Option(envvar="FREESTEP_TOKEN", help="A bearer token.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
OfCheckpoint = Annotated[
    int | None, typer.Option("--checkpoint", min=0, help="The step of a kept checkpoint to read; else the newest step.")
]
RunName = Annotated[str, typer.Argument(help="The run's name.")]

WHERE_TOKENS_ARE_GIVEN = "see --token, FREESTEP_TOKEN or FREESTEP_TOKEN_FILE"
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""
_RETRY_FOR_S = 3.0
"""Short, since a person waits for the answer."""


def connect(url: str, token: str | None, *, patient: bool = False, timeout: float = 30.0) -> Client:
    """A client of the service; a setting that is wrong ends the command.

    patient: bears with outages as long as workers do, for commands that go on by themselves. timeout: seconds for which
    the service may say nothing.
    """
    try:
        return Client(url, token=token, timeout=timeout, retry_for=None if patient else _RETRY_FOR_S)
    except OSError as error:
        fail(2, str(error))


def fail(code: int, message: str) -> NoReturn:
    """Ends the command with a line on stderr."""
    print_error(f"freestep: {message}")
    sys.exit(code)


def or_dash(value: float | int | None) -> str:
    """A number as it is shown in tables."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def steps_or_dash(value: float | None) -> str:
    """A moving average of steps, to a thousandth: one that falls towards 0 is shown as 0 some time."""
    return or_dash(None if value is None else round(value, 3))


@contextmanager
def slow_imports() -> Iterator[None]:
    """Makes Ctrl-C end the process at once and silently: an interrupted import of torch ends in a traceback."""
    before = signal.getsignal(signal.SIGINT)
    # A process in the background may have been started with the signal ignored.
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
