"""`freestep region`: works for a region's run at a parent's, until it is ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from freestep.api.models import Dtype, PointDtype
from freestep.client import DEFAULT_URL
from freestep.commands.control import parsed_changes
from freestep.commands.shared import RunName, Token, Url, connect, fail, slow_imports
from freestep.errors import FreestepError
from freestep.leaving import leave_on_sigterm
from freestep.terminal import print_line

if TYPE_CHECKING:
    from freestep.region import Region

__all__ = ["region"]


def region(
    run: RunName,
    parent: Annotated[str, typer.Option(help="The URL of the parent's service.")],
    every: Annotated[int, typer.Option(min=1, help="Updates of the region's run that make a round.")],
    created: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...",
            help="For a parent's run that there is not yet: algorithm and hyperparameters (lr=1, momentum=0.5), and "
            "fields of the aggregation (aggregation.policy=sync).",
        ),
    ] = None,
    parent_run: Annotated[str | None, typer.Option(help="The parent's run; by default of the same name.")] = None,
    parent_token: Annotated[
        str | None, typer.Option(envvar="FREESTEP_PARENT_TOKEN", help="A bearer token for the parent's service.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Keeps where the region stands; by default RUN.region in this folder.")
    ] = None,
    worker: Annotated[str | None, typer.Option(help="The region's name at the parent; by default one is made.")] = None,
    durability: Annotated[
        Literal["none", "checkpoint", "journal"] | None, typer.Option(help="That of a parent's run that is created.")
    ] = None,
    push_dtype: Annotated[Dtype | None, typer.Option(help="The dtype of pushes.")] = None,
    push_encoding: Annotated[
        Literal["dense", "int8", "topk"], typer.Option(help="Fewer bytes for each push; what is left out comes later.")
    ] = "dense",
    topk_fraction: Annotated[float, typer.Option(help="For topk: the share of each tensor that is pushed.")] = 0.01,
    pull_dtype: Annotated[PointDtype, typer.Option(help="The dtype in which the parent's y comes.")] = "F32",
    once: Annotated[
        bool,
        typer.Option("--once", help="Push what the run has made since the last round, take the parent's y, and end."),
    ] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Have a run, with the workers beside it, be one worker of a run at a service far away.

    It may be ended at any moment, also by SIGKILL: started again with the same file, it goes on where it was.
    """
    if parent_token is None and (token or os.environ.get("FREESTEP_TOKEN_FILE")):
        fail(2, "the token of the region's service is not sent to the parent's: give --parent-token")
    asked: dict[str, Any] = parsed_changes(created or [])
    if "groups" in asked:
        fail(2, "a parent's run has no param groups of its own")
    with slow_imports():
        from freestep.region import Region
    leave_on_sigterm()
    with connect(url, token, patient=True) as here, connect(parent, parent_token, patient=True) as far:
        try:
            made = Region(
                here.run(run),
                far.run(parent_run or run),
                file or Path(f"{run}.region"),
                every=every,
                worker=worker,
                optimizer=asked.get("optimizer"),
                aggregation=asked.get("aggregation"),
                options={} if durability is None else {"durability": durability},
                push_dtype=push_dtype,
                push_encoding=push_encoding,
                topk_fraction=topk_fraction,
                pull_dtype=pull_dtype,
            )
        except OSError as error:
            fail(2, f"{file or Path(f'{run}.region')} cannot be used: {error.strerror}")
        except FreestepError as error:
            fail(2, str(error))
        with made:
            if once:
                made.finish()
                _tell(made)
            while not once:
                made.run_rounds(1)
                _tell(made)


def _tell(region: Region) -> None:
    place, receipt = region.place, region.receipt
    assert place is not None
    if receipt is None:
        outcome = "nothing was pushed"
    else:
        reason = f" ({receipt.reason})" if receipt.reason else ""
        outcome = f"the last push was {receipt.decision}{reason}, {receipt.staleness} steps stale"
    print_line(f"round {place.round} begins at step {place.step} of the parent: {outcome}")
