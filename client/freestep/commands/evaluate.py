"""`freestep evaluate`: calls a function of the user's with each new x, and reports what it returns."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import ValidationError

from freestep.answers import Snapshot
from freestep.api.models import MetricReport
from freestep.api.validation import first_fault
from freestep.client import DEFAULT_URL
from freestep.commands.shared import Json, RunName, Token, Url, connect, fail, slow_imports
from freestep.commands.user_function import UserFunction
from freestep.errors import EpochChanged, FreestepError, IdempotencyConflict
from freestep.leaving import leave_on_sigterm
from freestep.run import Run
from freestep.terminal import print_error, print_line

if TYPE_CHECKING:
    from freestep.best_weights import BestWeights

__all__ = ["evaluate"]


def evaluate(
    run: RunName,
    function: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT.py:FUNCTION",
            help="It is called with x, a dict of tensors by name, and with step if it has a parameter of that name. It "
            "returns a dict of metrics, or a number, which is then called like the function.",
        ),
    ],
    every: Annotated[int, typer.Option(min=1, help="The fewest steps between two evaluations.")] = 1,
    keep_best: Annotated[
        tuple[str, Path] | None,
        typer.Option(metavar="METRIC FILE", help="Keep x of the metric's best value in a safetensors file."),
    ] = None,
    mode: Annotated[
        Literal["max", "min"] | None, typer.Option(help="Whether larger or smaller values of METRIC are better.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Evaluate the newest x, and end.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Evaluate each new x of a run with a function of yours, and report its metrics, until Ctrl-C or SIGTERM."""
    # As process 1 of a container it would ignore the signal.
    leave_on_sigterm()
    if mode is not None and keep_best is None:
        fail(2, "--mode goes with --keep-best METRIC FILE")
    with slow_imports():
        import torch  # noqa: F401
    measure = UserFunction(function)
    with connect(url, token, patient=True) as client:
        remote = client.run(run)
        best = None if keep_best is None else _best(remote, *keep_best, mode)
        for _, x in remote.watch("x", every=every):
            metrics = measure(x)
            _require_reportable(function, metrics, x, best)
            is_best = [name for name, value in metrics.items() if _report(remote, name, value, x, best)]
            _show(x, metrics, is_best, as_json)
            if once:
                return


def _best(run: Run, metric: str, path: Path, mode: Literal["max", "min"] | None) -> BestWeights:
    from freestep.best_weights import needs_mode

    if mode is None and needs_mode(metric):
        fail(2, f"--keep-best: is a smaller or a larger {metric!r} better? Say --mode min or --mode max")
    try:
        return run.keep_best(metric, path, mode=mode)
    except (FreestepError, OSError) as error:
        fail(2, f"--keep-best: {error}")


def _require_reportable(function: str, metrics: Mapping[str, float], x: Snapshot, best: BestWeights | None) -> None:
    """Ends the command before any of them is reported."""
    for name, value in metrics.items():
        try:
            MetricReport(name=name, value=value, step=x.step)
        except ValidationError as error:
            fail(1, f"{function} returned {name}={value:g} at step {x.step}: {first_fault(error)[1]}")
    if best is not None and best.metric not in metrics:
        fail(
            1, f"{function} returned no {best.metric!r}, which --keep-best names, but {', '.join(metrics) or 'nothing'}"
        )


def _report(run: Run, name: str, value: float, x: Snapshot, best: BestWeights | None) -> bool:
    """Reports a metric; whether x was written as the best so far."""
    if best is not None and name == best.metric:
        try:
            return best(x, value)
        except OSError as error:
            fail(2, f"{best.path} cannot be written: {error.strerror}")
    try:
        run.report(name, value, x.step, epoch=x.epoch)
    except (EpochChanged, IdempotencyConflict) as error:
        print_error(f"freestep: {name} {value:g} at step {x.step} is not reported: {error}")
    return False


def _show(x: Snapshot, metrics: Mapping[str, float], is_best: list[str], as_json: bool) -> None:
    if as_json:
        document = {"run": x.run, "epoch": x.epoch, "step": x.step, "metrics": metrics, "kept": bool(is_best)}
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()
        return
    listed = ", ".join(
        f"{name} {value:.4g}" + (" (best so far)" * (name in is_best)) for name, value in metrics.items()
    )
    print_line(f"step {x.step}: {listed}")
