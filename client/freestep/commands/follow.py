"""`freestep follow`: a run's curves in the programs that people keep curves in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from freestep.client import DEFAULT_URL
from freestep.commands.shared import RunName, Token, Url, connect, fail
from freestep.terminal import print_error, print_line

__all__ = ["follow"]


def follow(
    run: RunName,
    to: Annotated[
        list[str],
        typer.Option(
            help="Where the curves go: tensorboard:DIR, wandb:PROJECT, mlflow:EXPERIMENT, mlflow:URI, "
            "mlflow:URI|EXPERIMENT or trackio:PROJECT; may be given more than once."
        ),
    ],
    state: Annotated[
        Path | None,
        typer.Option(
            help="The file that keeps how far the run was followed; by default follow-RUN.json in this folder."
        ),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps for which there is one point of what pushes told.")] = 1,
    once: Annotated[bool, typer.Option("--once", help="End with what has happened so far.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Log a run's curves as its service tells them, not as one worker sees them; a restart goes on behind the last.

    SIGTERM and Ctrl-C end it in order. Gaps are told on stderr.
    """
    # Its trackers are loaded by those who name them.
    from freestep.integrations.follow import Ending
    from freestep.integrations.follow import follow as follow_run
    from freestep.integrations.trackers import Target

    file = state or Path(f"follow-{run}.json")
    with connect(url, token, patient=True) as client, Ending() as ending:
        targets = [Target.parse(each) for each in dict.fromkeys(to)]
        try:
            logged = follow_run(client.run(run), targets, file, every=every, is_live=not once, ending=ending, say=_say)
        except OSError as error:
            fail(2, f"{file} cannot be used: {error.strerror}")
    print_line(f"{logged} points of {run} were logged to {', '.join(to)}; {file} has where to go on")


def _say(line: str) -> None:
    print_error(f"freestep: {line}")
