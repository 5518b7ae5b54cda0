"""`freestep data`: the data sets of a run, and who has which part of them."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from freestep.api.data import DataStatus
from freestep.client import DEFAULT_URL
from freestep.commands.shared import Json, RunName, Token, Url, connect, or_dash
from freestep.terminal import print_line, print_result

__all__ = ["data"]

data = typer.Typer(help="See how much of a run's data has counted.", no_args_is_help=True)

_DATA = ("data set", "examples", "unit", "passes", "open", "out", "done", "examples done")
_PASSES = ("data set", "pass", "open", "out", "done")
_HOLDERS = ("data set", "worker", "units", "oldest for")


@data.callback()
def _group() -> None:
    """Has `show` stay a command of its own, which a group of one command would not."""


@data.command("show")
def show_data(run: RunName, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """Show a run's data sets: the passes, what of them is open, out with whom and for how long, and done."""
    with connect(url, token) as client:
        found = client.run(run).data_sets()
    if not found and not as_json:
        print_line(f"the run {run} has no data sets")
        return
    print_result(found, as_json, _DATA, [_facts(each) for each in found])
    if as_json:
        return
    if passes := [(each.name, one.of_pass, one.open, one.out, one.done) for each in found for one in each.passes]:
        print_result(found, False, _PASSES, passes)
    if holders := [
        (each.name, holder.worker, holder.units, f"{holder.oldest_ms / 1000:.1f} s")
        for each in found
        for holder in each.holders
    ]:
        print_result(found, False, _HOLDERS, holders)


def _facts(status: DataStatus) -> Sequence[object]:
    of_all = "" if status.spec.passes is None else f" of {status.spec.passes}"
    return (status.name, status.spec.length, status.spec.unit, f"{status.passes_done}{of_all} done",
            or_dash(status.open), status.out, status.done, status.examples_done)  # fmt: skip
