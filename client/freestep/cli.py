"""The `freestep` command.

Exit codes: 0 done, 1 refused by the service, 2 used wrongly, 3 the service cannot be reached, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from freestep.api.models import MOST_SHARDS, Checkpoint, Metric, MetricReport, Point, PointDtype, RunStatus
from freestep.client import DEFAULT_URL, Client, Pulled
from freestep.errors import FreestepError, ServiceUnreachable
from freestep.flat import Flat
from freestep_command import importing

__all__ = ["main"]

app = typer.Typer(
    name="freestep",
    help="Schedule-Free optimization as a service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
runs = typer.Typer(help="List, show, reshard and delete runs.", no_args_is_help=True)
app.add_typer(runs, name="runs")

Url = Annotated[str, typer.Option(envvar="FREESTEP_URL", help="The service's URL.")]
Token = Annotated[str | None, typer.Option(envvar="FREESTEP_TOKEN", help="A bearer token.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
RunName = Annotated[str, typer.Argument(help="The run's name.")]

RETRY_FOR_S = 3.0
"""A person at a terminal is told soon that the service is away."""


def main() -> None:
    """Runs the command; see the module's docstring for its exit codes."""
    try:
        app()
    except ServiceUnreachable as error:
        _fail(3, str(error))
    except FreestepError as error:
        _fail(1, str(error))
    except KeyboardInterrupt:
        sys.exit(130)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Run the service (`freestep serve --help` lists its settings)."""
    try:
        with importing():
            from freestep_service.server import main as serve_main
    except ImportError as error:
        _fail(2, f"the service is not installed ({error}); pip install 'freestep[service]' brings it")
    serve_main(context.args)


@runs.command("list")
def list_runs(url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """List all runs."""
    with _client(url, token) as client:
        found = client.runs()
    rows = [
        (status.run, status.spec.optimizer.algorithm, status.spec.aggregation.policy, status.step, status.epoch,
         len(status.workers), status.parameter_count)
        for status in found
    ]  # fmt: skip
    _print(found, as_json, ("run", "algorithm", "policy", "step", "epoch", "workers", "parameters"), rows)


@runs.command("show")
def show_run(run: RunName, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """Show one run."""
    with _client(url, token) as client:
        remote = client.run(run)
        status = remote.status()
        missing = [] if as_json else remote.topology().missing
    _print(status, as_json, ("", ""), _facts(status, missing))


@runs.command("topology")
def show_topology(run: RunName, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """Show where a run's shards are."""
    with _client(url, token) as client:
        topology = client.run(run).topology()
    rows = [
        (shard.index, shard.url or "nobody's", f"{shard.begin:,} to {shard.end:,}", len(shard.slices),
         _or_dash(shard.applied_step), _or_dash(shard.durable_step))
        for shard in topology.shards
    ]  # fmt: skip
    _print(topology, as_json, ("shard", "is at", "elements", "tensors", "applied step", "durable step"), rows)


@runs.command("reshard")
def reshard_run(
    run: RunName,
    shards: Annotated[int, typer.Option(min=1, max=MOST_SHARDS, help="How many shards there are to be.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Cut a run into another number of shards; its workers go on by themselves."""
    with _client(url, token) as client:
        status = client.run(run).reshard(shards)
    _print(status, as_json, ("", ""), _facts(status))


@runs.command("delete")
def delete_run(
    run: RunName,
    url: Url = DEFAULT_URL,
    token: Token = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run, its checkpoints included."""
    if not yes:
        typer.confirm(f"Delete the run {run} and its checkpoints?", abort=True)
    with _client(url, token) as client:
        client.run(run).delete()


@app.command()
def workers(run: RunName, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """List a run's live workers."""
    with _client(url, token) as client:
        found = client.run(run).workers()
    rows = [
        (worker.worker, worker.pushes, _or_dash(worker.step), _or_dash(worker.staleness), _or_dash(worker.speed),
         f"{worker.expires_in_ms / 1000:.1f} s")
        for worker in found
    ]  # fmt: skip
    _print(found, as_json, ("worker", "pushes", "last at step", "staleness", "steps/s", "lease ends in"), rows)


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
        _fail(2, f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}")
    with _client(url, token) as client:
        receipt = client.run(run).report(made.name, made.value, made.step, epoch=made.epoch)
    if as_json:
        _json(receipt.model_dump(mode="json"))
    else:
        _say(f"{name} of {run} at step {step} is {value:g}" + (", as reported before" if receipt.replayed else ""))


@app.command()
def pull(
    run: RunName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    point: Annotated[Point, typer.Option(help="x: the average; y: where gradients are taken; z: the iterate.")] = "x",
    dtype: Annotated[
        PointDtype, typer.Option(help="The tensors' dtype; I8 travels as int8 and is F32 in the file.")
    ] = "F32",
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Write a run's parameters to a safetensors file, whole or not at all."""
    with _client(url, token) as client:
        remote = client.run(run)
        flat = Flat(remote.manifest, dtype)
        pulled = remote.pull_into(flat, point)
    _write(output, flat, run, point, pulled)
    if as_json:
        _json({"run": run, "point": point, "epoch": pulled.epoch, "step": pulled.step, "output": str(output)})
    else:
        _say(f"{point} of {run} at step {pulled.step} is in {output}")


@app.command()
def checkpoint(
    run: RunName,
    restore: Annotated[int | None, typer.Option(help="Go back to the checkpoint of this step.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List the checkpoints that are kept.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint now, list those that are kept, or go back to one."""
    with _client(url, token) as client:
        remote = client.run(run)
        if restore is not None:
            status = remote.restore(restore)
            _print(status, as_json, ("", ""), _facts(status))
            return
        found: Sequence[Checkpoint] = remote.checkpoints() if show else [remote.checkpoint()]
    rows = [(each.step, each.epoch, each.created_at, each.bytes) for each in found]
    _print(found if show else found[0], as_json, ("step", "epoch", "written at", "bytes"), rows)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where data and the plot go.")] = Path("demo-out"),
    plain: Annotated[bool, typer.Option(help="Lines instead of a live display.")] = False,
) -> None:
    """Train a small convolutional net on real digits: a service, four workers, a kill and a join."""
    try:
        with importing():
            from freestep.demo.main import run_demo
    except ImportError as error:
        _fail(2, f"the demo is not installed ({error}); pip install 'freestep[demo]' brings it")
    raise typer.Exit(run_demo(output, plain=plain))


def _client(url: str, token: str | None) -> Client:
    try:
        return Client(url, token=token, retry_for=RETRY_FOR_S)
    except OSError as error:
        _fail(2, str(error))


def _facts(status: RunStatus, missing: Sequence[int] = ()) -> list[tuple[str, str]]:
    settings = status.spec.optimizer.model_dump(exclude={"algorithm"}, exclude_none=True)
    unowned = f"; nobody owns {', '.join(map(str, missing))}" if missing else ""
    return [
        ("run", status.run),
        ("step", str(status.step)),
        ("epoch", str(status.epoch)),
        ("initialized", "yes" if status.initialized else "no"),
        ("algorithm", status.spec.optimizer.algorithm),
        ("", " ".join(f"{name}={value}" for name, value in settings.items())),
        ("policy", status.spec.aggregation.policy),
        ("parameters", f"{status.parameter_count:,} in {len(status.spec.parameters)} tensors"),
        ("shards", f"{status.shards}{unowned}"),
        ("workers", ", ".join(worker.worker for worker in status.workers) or "-"),
        ("pushes", ", ".join(f"{count} {decision}" for decision, count in status.pushes.items())),
        ("loss", _or_dash(status.loss)),
        ("staleness", _or_dash(status.staleness)),
        ("metrics", ", ".join(_told(name, metric) for name, metric in status.metrics.items()) or "-"),
        ("checkpoint", _or_dash(status.checkpoint_step)),
    ]


def _told(name: str, metric: Metric) -> str:
    return f"{name} {metric.value:.4g} at step {metric.step}"


def _write(output: Path, flat: Flat, run: str, point: str, pulled: Pulled) -> None:
    metadata = {
        "freestep.run": run,
        "freestep.epoch": str(pulled.epoch),
        "freestep.step": str(pulled.step),
        "freestep.point": point,
    }
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for piece in flat.body(metadata):
                file.write(piece)
        temporary.replace(output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        _fail(2, f"{output} cannot be written: {error.strerror}")


def _print(
    found: BaseModel | Sequence[BaseModel], as_json: bool, columns: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    if as_json:
        _json(
            found.model_dump(mode="json")
            if isinstance(found, BaseModel)
            else [each.model_dump(mode="json") for each in found]
        )
        return
    table = Table(box=None, header_style="bold", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def _json(document: object) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def _or_dash(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _fail(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"freestep: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
