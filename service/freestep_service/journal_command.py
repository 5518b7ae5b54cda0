"""`freestep journal`: what runs' journals on this host's disk hold, and the way out where one is damaged."""

from __future__ import annotations

import json
import sys
from collections import deque
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from freestep_service.settings import Settings
from freestep_service.storage.checksummed import Damaged, NewerFormat
from freestep_service.storage.journal_repair import (
    Examination,
    Repair,
    discard,
    examine,
    journal_directories,
    look,
    repair,
    rows,
)

__all__ = ["main"]

app = typer.Typer(
    help="Verify, show and repair the journals on this host's disk.", no_args_is_help=True, add_completion=False
)

Data = Annotated[Path | None, typer.Option(help="The service's; FREESTEP_DATA_DIR by default.")]
Journals = Annotated[Path | None, typer.Option(help="The service's; FREESTEP_JOURNAL_DIR by default.")]
Run = Annotated[str, typer.Argument(help="The run's name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_COLUMNS = ("segment", "byte", "kind", "epoch", "seq", "step", "lease", "worker", "decision", "staleness",
            "body_bytes", "key")  # fmt: skip

_UNREADABLE = (Damaged, NewerFormat, OSError)
"""What keeps a journal from being read, shown or repaired."""

_BEHIND = {
    "torn": "behind its end that are no whole frame, as a crash or a write under way leaves them",
    "allocated": "of room allocated in advance",
}
"""What may be behind the last frame of a journal."""


def main(arguments: list[str]) -> None:
    """`freestep journal`. Exits with 1 where a journal is damaged or refused, and with 2 if it is used wrongly."""
    try:
        app(arguments, prog_name="freestep journal")
    except _UNREADABLE as error:
        _fail(1, str(error))


@app.command()
def verify(
    run: Annotated[str | None, typer.Argument(help="The run's name; all runs by default.")] = None,
    data_dir: Data = None,
    journal_dir: Journals = None,
    as_json: Json = False,
) -> None:
    """Read journals wholly, the bodies of pushes included; exits with 1 where one is damaged."""
    found = [_examined(directory) for directory in _directories(run, data_dir, journal_dir)]
    documents = [_verdict(each) for each in found]
    if as_json:
        _print_json(documents)
    else:
        for document in documents:
            _print(_sentence(document))
    if any(each.damage is not None for each in found):
        raise typer.Exit(1)


@app.command()
def show(
    run: Run,
    shard: Annotated[str | None, typer.Option(help="A shard: its number, or its elements as BEGIN-END.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many frames of each shard only.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="The newest so many frames of each shard only.")] = None,
    data_dir: Data = None,
    journal_dir: Journals = None,
    as_json: Json = False,
) -> None:
    """Show a line for each frame: segments, parts of pushes, and entries of the log.

    The bodies of pushes are not read (`verify` reads them). Exits with 1 where one is damaged, after what is before
    that.
    """
    directories = _directories(run, data_dir, journal_dir)
    shown: dict[str, list[dict[str, Any]]] = {}
    damage: dict[str, Exception] = {}
    for index, directory in enumerate(directories):
        if shard in (None, directory.name, str(index)):
            read = partial(_rows, directory, limit, last)
            shown[directory.name], error = look(read, lambda found: found[1])
            if error is not None:
                damage[directory.name] = error
    if not shown:
        _fail(2, f"run {run} has no shard {shard} here: {', '.join(each.name for each in directories)}")
    if as_json:
        _print_json(shown)
    for name, frames in () if as_json else shown.items():
        _print(f"elements {name}")
        cells = [_COLUMNS, *(["-" if row[each] is None else str(row[each]) for each in _COLUMNS] for row in frames)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            _print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if damage:
        _fail(1, "; ".join(f"{run} {name} is shown up to its damage: {error}" for name, error in damage.items()))


def _rows(directory: Path, limit: int | None, last: int | None) -> tuple[list[dict[str, Any]], Exception | None]:
    """The frames that are to be shown, up to damage, and that."""
    found: deque[dict[str, Any]] = deque(maxlen=last)
    try:
        for number, row in enumerate(rows(directory)):
            if limit is None or number < limit:
                found.append(row)
    except _UNREADABLE as error:
        return list(found), error
    return list(found), None


@app.command("repair")
def repair_run(
    run: Run,
    give_up: Annotated[
        bool, typer.Option("--discard", help="Set the journals aside wholly: the run goes back to its checkpoint.")
    ] = False,
    data_dir: Data = None,
    journal_dir: Journals = None,
) -> None:
    """Keep the entries before the damage, and set aside what is behind it."""
    act, is_any, has_cut, problems = discard if give_up else repair, False, False, []
    for directory in _directories(run, data_dir, journal_dir):
        try:
            done = act(directory)
        except _UNREADABLE as error:
            problems.append(f"{run} {directory.name}: {error}")
            continue
        if done is not None:
            is_any, has_cut = True, has_cut or done.has_cut
            _print(_told(done))
    if has_cut:
        place = "from the newest checkpoint" if give_up else "at the newest entry"
        _print(
            f"{run}: it goes on {place} that all its shards have, in a new epoch; what was acknowledged since is lost"
        )
    if not is_any and not problems:
        problems = [f"run {run}: nothing to {'discard' if give_up else 'repair'}"]
    if problems:
        _fail(1, "; ".join(problems))


def _directories(run: str | None, data_dir: Path | None, journal_dir: Path | None) -> list[Path]:
    """The shards' directories; ends the command where there are none of the run."""
    given = {"data_dir": data_dir, "journal_dir": journal_dir}
    try:
        journals = Settings.model_validate(
            Settings().model_dump() | {name: path for name, path in given.items() if path is not None}
        ).journals()
    except ValidationError as error:
        _fail(2, "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()))
    try:
        found = journal_directories(journals, run)
    except OSError as error:
        _fail(1, f"the journals in {journals} cannot be read: {error}")
    if run is None and not found:
        sys.stderr.write(f"freestep journal: there are no journals in {journals}\n")
    if run is not None and not found:
        _fail(1, f"there is no journal of run {run} in {journals}")
    return found


def _examined(directory: Path) -> Examination:
    """As `examine`; a journal that cannot be read keeps no others from being read."""
    try:
        return examine(directory)
    except OSError as error:
        return Examination(directory, 0, damage=Damaged(f"it cannot be read: {error}"))


def _verdict(found: Examination) -> dict[str, Any]:
    verdict = {"run": found.directory.parent.name, "elements": found.directory.name, "bytes": found.bytes}
    if found.contents is None:
        return {**verdict, "damage": str(found.damage)}
    entries = found.contents.entries
    return {
        **verdict,
        "epoch": found.contents.epoch,
        "base": found.contents.base and f"step {found.contents.base.step} of epoch {found.contents.base.epoch}",
        "entries": f"{entries[0].seq}-{entries[-1].seq}" if entries else "none",
        "undecided": len(found.contents.parts),
        "unsound": found.unsound or None,
        "torn": found.contents.torn - found.allocated,
        "allocated": found.allocated,
    }


def _sentence(verdict: dict[str, Any]) -> str:
    """A verdict in one line."""
    names = {"unsound": "of which not whole"}
    members = [
        f"{names.get(name, name)} {value}"
        for name, value in verdict.items()
        if value is not None and name not in _BEHIND
    ]
    if "damage" not in verdict:
        members = ["sound", *members]
    members += [f"{verdict[name]} bytes {what}" for name, what in _BEHIND.items() if verdict.get(name)]
    return ", ".join(members)


def _told(done: Repair) -> str:
    kept = f"entries {done.first} to {done.last}" if done.last else "no entries"
    # Of what cannot be read, nobody can tell how many entries it was.
    lost = f"entries {done.lost[0]} to {done.lost[-1]} and what cannot be read" if done.lost else "what is behind them"
    if not done.has_cut:
        lost = "nothing"
    pushes = ", ".join(f"{count} of {worker}" for worker, count in sorted(done.pushes.items()))
    aside = ", ".join(path.name for path in done.aside)
    return (
        f"{done.directory.parent.name} {done.directory.name}: kept {kept}; lost {lost}"
        f"{f' (pushes: {pushes})' if pushes else ''}; set aside: {aside}"
    )


def _print(line: str) -> None:
    sys.stdout.write(f"{_printable(line)}\n")


def _printable(line: str) -> str:
    """A line with its control characters as escape sequences: workers choose keys."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def _print_json(document: object) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _fail(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"freestep journal: {_printable(message)}\n")
    sys.exit(code)
