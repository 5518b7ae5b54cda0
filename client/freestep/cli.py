"""The `freestep` command.

Exit codes: 0 done, 1 refused by the service or failed in the user's script, 2 used wrongly, 3 the service cannot be
reached, 130 interrupted, 143 ended by SIGTERM.

Only the commands that need torch import it, since that takes seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from freestep.api.models import MOST_SHARDS, Checkpoint, MetricReport
from freestep.api.validation import first_fault
from freestep.client import DEFAULT_URL
from freestep.commands.control import end_worker, pause, resume, set_run
from freestep.commands.dashboard import dashboard
from freestep.commands.data import data
from freestep.commands.doctor import doctor
from freestep.commands.evaluate import evaluate
from freestep.commands.events import events
from freestep.commands.facts import facts, policy_of
from freestep.commands.follow import follow
from freestep.commands.history import history
from freestep.commands.pull import pull
from freestep.commands.region import region
from freestep.commands.shared import (
    INTERRUPTED,
    WHERE_TOKENS_ARE_GIVEN,
    Json,
    OfCheckpoint,
    RunName,
    Token,
    Url,
    connect,
    fail,
    or_dash,
    slow_imports,
)
from freestep.commands.tokens import tokens
from freestep.commands.top import top
from freestep.commands.workers import workers
from freestep.errors import (
    AlreadyInitialized,
    FreestepError,
    InvalidSetting,
    ProblemError,
    ServiceUnreachable,
    Unauthenticated,
)
from freestep.files import is_stdout
from freestep.terminal import print_json, print_line, print_result, printable, show_all_characters

__all__ = ["main"]

app = typer.Typer(
    name="freestep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
runs = typer.Typer(help="List, show, move, reshard and delete runs.", no_args_is_help=True)
app.add_typer(runs, name="runs")
app.add_typer(data, name="data")
app.add_typer(tokens, name="tokens")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print_line(f"freestep {version('freestep')}")
        raise typer.Exit


@app.callback()
def before_commands(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Schedule-Free optimization as a service."""


def main() -> None:
    """Runs the command, and exits with one of the codes in the module's docstring."""
    _open_streams()
    show_all_characters()
    try:
        try:
            app()
        finally:
            # At the interpreter's end it would be too late to say that a disk is full.
            sys.stdout.flush()
    except InvalidSetting as error:
        fail(2, str(error))
    except ServiceUnreachable as error:
        fail(3, str(error))
    except Unauthenticated as error:
        fail(1, f"{error}: {WHERE_TOKENS_ARE_GIVEN}")
    except FreestepError as error:
        fail(1, str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        # The interpreter writes once more what was not written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        # Commands tell of their files by themselves.
        fail(2, str(error) if error.filename else f"the output cannot be written: {error.strerror}")


def _open_streams() -> None:
    """Has the null device for a standard stream that is closed: the next file or connection would have its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Run the service (`freestep serve --help` lists its settings)."""
    try:
        with slow_imports():
            from freestep_service.server import main as serve_main
    except ImportError as error:
        fail(2, f"the service is not installed ({error}): pip install 'freestep[service]'")
    serve_main(context.args)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def journal(context: typer.Context) -> None:
    """Verify, show and repair journals on this host's disk (`freestep journal --help`)."""
    try:
        with slow_imports():
            from freestep_service.journal_command import main as journal_main
    except ImportError as error:
        fail(2, f"the service is not installed ({error}): pip install 'freestep[service]'")
    journal_main(context.args)


@runs.command("list")
def list_runs(url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """List all runs."""
    with connect(url, token) as client:
        found = client.runs()
    rows = [
        (status.run, status.spec.optimizer.algorithm, policy_of(status), status.step, status.epoch,
         len(status.workers), status.parameter_count)
        for status in found
    ]  # fmt: skip
    print_result(found, as_json, ("run", "algorithm", "policy", "step", "epoch", "workers", "parameters"), rows)


@runs.command("show")
def show_run(run: RunName, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """Show one run."""
    with connect(url, token) as client:
        remote = client.run(run)
        status = remote.status()
        missing = [] if as_json else remote.topology().missing
    print_result(status, as_json, ("", ""), facts(status, missing))


@runs.command("topology")
def show_topology(run: RunName, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """Show a run's shards and their owners."""
    with connect(url, token) as client:
        topology = client.run(run).topology()
    rows = [
        (shard.index, shard.url or "no owner", f"{shard.begin:,} to {shard.end:,}", len(shard.slices),
         or_dash(shard.applied_step), or_dash(shard.durable_step))
        for shard in topology.shards
    ]  # fmt: skip
    print_result(topology, as_json, ("shard", "owner", "elements", "tensors", "applied step", "durable step"), rows)


@runs.command("reshard")
def reshard_run(
    run: RunName,
    shards: Annotated[int, typer.Option(min=1, max=MOST_SHARDS, help="The new number of shards.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Divide a run into another number of shards; its workers go on."""
    with connect(url, token) as client:
        status = client.run(run).reshard(shards)
    print_result(status, as_json, ("", ""), facts(status))


@runs.command("export")
def export_run(
    run: RunName,
    file: Annotated[Path, typer.Argument(help="The safetensors file to write; - for stdout.")],
    checkpoint: OfCheckpoint = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Write a run's whole state to a file: every vector of its optimizer, and all scalars."""
    with slow_imports(), connect(url, token) as client:
        state = client.run(run).export_state(checkpoint=checkpoint)
    try:
        state.save(file)
    except OSError as error:
        fail(2, f"{file} cannot be written: {error.strerror}")
    if not is_stdout(file):
        print_line(f"the state of {run} at step {state.step} is in {file}")


@runs.command("import")
def import_run(
    run: RunName,
    file: Annotated[Path, typer.Argument(help="The safetensors file of a state; - for stdin.")],
    replace: Annotated[bool, typer.Option(help="Replace the state that the run has, in a new epoch.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Give a run a whole state, and create the run if there is none."""
    with slow_imports():
        from freestep.run_state import RunState
    try:
        if str(file) == "-":
            content = sys.stdin.buffer.read()
            state = RunState.read_from(BytesIO(content), len(content))
        else:
            state = RunState.load(file)
    except OSError as error:
        fail(2, f"{file} cannot be read: {error.strerror}")
    except ProblemError as error:
        fail(2, f"{file} holds no state of a run: {error}")
    with connect(url, token) as client:
        try:
            status = client.run(run).import_state(state, replace=replace)
        except AlreadyInitialized as error:
            fail(1, f"{error}: --replace puts this state in their place, in a new epoch")
    print_result(status, as_json, ("", ""), facts(status))


@runs.command("delete")
def delete_run(
    run: RunName,
    url: Url = DEFAULT_URL,
    token: Token = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run and its checkpoints."""
    if not yes:
        typer.confirm(f"Delete the run {printable(run)} and its checkpoints?", abort=True)
    with connect(url, token) as client:
        client.run(run).delete()


app.command()(dashboard)
app.command()(workers)
app.command()(events)
app.command()(history)
app.command()(top)
app.command()(follow)
app.command("set")(set_run)
app.command()(pause)
app.command()(resume)
app.command("end-worker")(end_worker)


@app.command()
def report(
    run: RunName,
    name: Annotated[str, typer.Argument(help="The metric's name.")],
    value: Annotated[float, typer.Argument(help="Its value; after -- if it is negative.")],
    step: Annotated[int, typer.Option(min=0, help="The step of the x at which it was measured.")],
    epoch: Annotated[int | None, typer.Option(min=0, help="The epoch of that x.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Report a metric of a run, for its status and its plateau schedules."""
    try:
        made = MetricReport(name=name, value=value, step=step, epoch=epoch)
    except ValidationError as error:
        (field, *_), why = first_fault(error)
        fail(2, f"{field}: {why}")
    with connect(url, token) as client:
        receipt = client.run(run).report(made.name, made.value, made.step, epoch=made.epoch)
    if as_json:
        print_json(receipt)
    else:
        print_line(f"{name} of {run} at step {step} is {value:g}" + (", as reported before" * receipt.replayed))


app.command()(doctor)
app.command()(pull)
app.command()(evaluate)
app.command()(region)


@app.command()
def checkpoint(
    run: RunName,
    restore: Annotated[int | None, typer.Option(help="Return to the checkpoint of this step.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List the checkpoints that are kept.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint now, list those that are kept, or return to one."""
    if show and restore is not None:
        fail(2, "--list and --restore are two things to do: give one of them")
    with connect(url, token) as client:
        remote = client.run(run)
        if restore is not None:
            status = remote.restore(restore)
            print_result(status, as_json, ("", ""), facts(status))
            return
        found: Sequence[Checkpoint] = remote.checkpoints() if show else [remote.checkpoint()]
    rows = [(each.step, each.epoch, each.created_at, each.bytes) for each in found]
    print_result(found if show else found[0], as_json, ("step", "epoch", "written at", "bytes"), rows)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where data and the plot go.")] = Path("demo-out"),
    plain: Annotated[bool, typer.Option(help="Lines instead of a live display.")] = False,
) -> None:
    """Train a small convolutional net on real digits: a service, four workers, a kill and a join."""
    try:
        with slow_imports():
            from freestep.demo.main import run_demo
    except ImportError as error:
        fail(2, f"the demo is not installed ({error}): pip install 'freestep[demo]'")
    raise typer.Exit(run_demo(output, plain=plain))


if __name__ == "__main__":
    main()
