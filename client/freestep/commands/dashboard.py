"""`freestep dashboard`: the address of the service's page, which signs a browser in."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from freestep.client import DEFAULT_URL
from freestep.commands.shared import Token, Url, connect
from freestep.terminal import print_error, print_line

__all__ = ["dashboard"]


def dashboard(
    run: Annotated[str | None, typer.Argument(help="The run whose page it leads to.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in this machine's browser.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Print a link to the dashboard that signs a browser in: once, within five minutes."""
    with connect(url, token) as client:
        link = client.dashboard_link(run)
    # Alone on stdout, so that programs can open it.
    print_line(link)
    if "#sign-in=" in link:
        print_error("it is good once, for five minutes, and as much as the token that it was made with")
    if open_ and not webbrowser.open(link):
        print_error("no browser could be opened here")
