"""`freestep tokens`: who else may use the service, and for what."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from pydantic import ValidationError

from freestep.api.token_form import Scope
from freestep.api.tokens import TokenRequest, TokenStatus
from freestep.api.validation import first_fault
from freestep.client import DEFAULT_URL
from freestep.commands.shared import Json, Token, Url, connect, fail
from freestep.terminal import print_error, print_json, print_line, print_result

__all__ = ["tokens"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
"""Seconds."""

tokens = typer.Typer(help="Make, list and revoke tokens.", no_args_is_help=True)


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Option(help="What it is for, as lists and logs name it.")],
    scope: Annotated[
        Scope, typer.Option(help="read: look on, report metrics. push: also create runs, train. admin: everything.")
    ],
    runs: Annotated[str, typer.Option(help="The runs that it is for, a pattern: 'mnist-*'.")] = "*",
    worker: Annotated[str | None, typer.Option(help="The worker names that it is for, a pattern: 'site-a-*'.")] = None,
    expires: Annotated[str | None, typer.Option(help="After which it ends: 90s, 30m, 12h, 7d, 4w.")] = None,
    max_runs: Annotated[int | None, typer.Option(help="Runs that it may have created at once.")] = None,
    max_parameters: Annotated[int | None, typer.Option(help="Elements of these runs' parameters in all.")] = None,
    max_leases: Annotated[int | None, typer.Option(help="Leases that it may have at once.")] = None,
    max_bytes_per_minute: Annotated[
        int | None, typer.Option(help="Bytes of tensors that it may send and receive in a minute.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Make a token and print it: it is shown this once."""
    try:
        wish = TokenRequest(
            name=name,
            scope=scope,
            runs=runs,
            workers=worker,
            expires_in=_seconds(expires),
            max_runs=max_runs,
            max_parameters=max_parameters,
            max_leases=max_leases,
            max_bytes_per_minute=max_bytes_per_minute,
        )
    except ValidationError as error:
        (field, *_), why = first_fault(error)
        fail(2, f"{field}: {why}")
    with connect(url, token) as client:
        made = client.create_token(**wish.model_dump())
    if as_json:
        print_json(made)
        return
    # Alone on stdout, so that it can be written to a file.
    print_line(made.token)
    print_error(f"it is shown this once; to end it: freestep tokens revoke {made.id}")


@tokens.command("list")
def list_tokens(url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """List the tokens that are good."""
    with connect(url, token) as client:
        found = client.tokens()
    rows = [
        (each.id, each.name, each.scope, each.runs, each.workers or "*", each.created_at, each.expires_at or "-",
         each.last_used_at or "-", _quota(each))
        for each in found
    ]  # fmt: skip
    print_result(found, as_json, ("id", "name", "scope", "runs", "workers", "made", "ends", "last used", "quota"), rows)


@tokens.command("revoke")
def revoke_token(
    id: Annotated[str, typer.Argument(help="The token's id, as the list has it.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """End a token, at all processes of the service."""
    with connect(url, token) as client:
        client.revoke_token(id)


def _quota(status: TokenStatus) -> str:
    bounds = {
        "runs": status.max_runs,
        "parameters": status.max_parameters,
        "leases": status.max_leases,
        "bytes/min": status.max_bytes_per_minute,
    }
    return ", ".join(f"{most} {name}" for name, most in bounds.items() if most is not None) or "-"


def _seconds(duration: str | None) -> int | None:
    if duration is None:
        return None
    match = re.fullmatch(rf"([0-9]{{1,9}})([{''.join(_UNITS)}])", duration, re.ASCII)
    if match is None:
        fail(2, f"--expires: {duration!r} is no duration: 90s, 30m, 12h, 7d or 4w")
    return int(match[1]) * _UNITS[match[2]]
