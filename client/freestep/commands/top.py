"""`freestep top`: all runs of a service, one of them and its workers, as they go on."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from freestep.client import DEFAULT_URL
from freestep.commands.shared import Token, Url, connect, fail
from freestep.errors import ServiceUnreachable

__all__ = ["top"]

_TIMEOUT_S = 5.0
"""Short, since a person looks on."""


def top(
    run: Annotated[str | None, typer.Argument(help="The run to begin with; without it, all runs.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Watch all runs, one of them, and its workers: arrows and Enter look into one, Esc goes back, q quits."""
    try:
        from freestep.commands.live_view.app import LiveView
    except ImportError as error:
        fail(2, f"freestep top needs textual ({error}): pip install 'freestep[top]'")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        fail(2, "freestep top needs a terminal; for programs there are runs list --json, history and events --json")
    with connect(url, token, timeout=_TIMEOUT_S) as client:
        if run is not None:
            # The view shows what else fails, until it is well again.
            with suppress(ServiceUnreachable):
                client.run(run).status()
        LiveView(client, run).run()
