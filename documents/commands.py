"""The page of the `freestep` command, of its functions as they are declared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import cleandoc
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from documents.markdown import code, made_by, table
from freestep.cli import app
from freestep_service.journal_command import app as journal_app

__all__ = ["Command", "Parameter", "commands", "pages"]

_ELSEWHERE = {"freestep serve": "Its settings are in [settings](settings.md)."}


_EXIT_CODES = (
    ("0", "done"),
    ("1", "refused by the service, or failed in a script of yours"),
    ("2", "used wrongly"),
    ("3", "the service cannot be reached"),
    ("130", "interrupted"),
    ("143", "ended by SIGTERM: `evaluate` and `region`; `follow` ends with 0"),
)


@dataclass(frozen=True)
class Parameter:
    """An argument or option of a command.

    spellings: how an option is written; none for an argument. value: what stands for its value; none for a switch.
    count: how many values it takes.
    """

    name: str
    spellings: tuple[str, ...]
    value: str
    count: int
    is_required: bool
    default: str
    help: str


@dataclass(frozen=True)
class Command:
    """A command by its whole name, such as `freestep runs list`."""

    name: str
    help: str
    parameters: tuple[Parameter, ...]


def commands() -> list[Command]:
    """All commands, by name; those of `freestep journal`, which the service has, among them."""
    found = [*_commands(app, "freestep"), *_commands(journal_app, "freestep journal")]
    return sorted((each for each in found if each.name != "freestep journal"), key=lambda each: each.name)


def pages() -> Iterator[tuple[str, str]]:
    """The page by its name."""
    parts = [
        made_by("make reference", "Of the command's functions"),
        "# The command\n\n`freestep COMMAND --help` says the same on a terminal. Commands that ask a service take"
        " `--url` or `FREESTEP_URL`,\n`--token` or `FREESTEP_TOKEN`; with `--json` they print JSON, for programs.\n",
        table(("exit code", "means"), _EXIT_CODES),
        *map(_section, commands()),
    ]
    yield "commands.md", "\n".join(parts)


def _section(command: Command) -> str:
    options = [each for each in command.parameters if each.spellings]
    arguments = [each for each in command.parameters if not each.spellings]
    shown = [each.value if each.is_required else f"[{each.value}]" for each in arguments]
    usage = " ".join([command.name, *("[OPTIONS]" for _ in options[:1]), *shown])
    rows = [(code(each.value), each.help, each.default) for each in arguments]
    rows += [(", ".join(code(f"{each} {option.value}".strip()) for each in option.spellings), option.help,
              option.default) for option in options]  # fmt: skip
    parts = [f"## {command.name}\n\n{command.help}", f"```text\n{usage}\n```", table(("", "", "default"), rows).strip()]
    return "\n\n".join(part for part in (*parts, _ELSEWHERE.get(command.name, "")) if part) + "\n"


def _commands(group: typer.Typer, name: str) -> Iterator[Command]:
    for info in group.registered_commands:
        if info.callback is not None and not info.hidden:
            its = f"{name} {info.name or info.callback.__name__.replace('_', '-')}"
            yield Command(its, cleandoc(info.help or info.callback.__doc__ or ""), tuple(_parameters(info.callback)))
    for below in group.registered_groups:
        if below.typer_instance is not None:
            yield from _commands(below.typer_instance, f"{name} {below.name}")


def _parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    hints = get_type_hints(function, include_extras=True)
    for name, declared in inspect.signature(function).parameters.items():
        if get_origin(hints[name]) is not Annotated:
            continue
        kind, *metadata = get_args(hints[name])
        info = next((each for each in metadata if isinstance(each, OptionInfo | ArgumentInfo)), None)
        if info is None or getattr(info, "hidden", False):
            continue
        is_required = declared.default is inspect.Parameter.empty
        value, count = _value(kind, info, name)
        if isinstance(info, ArgumentInfo):
            yield Parameter(name, (), info.metavar or name.upper(), count, is_required, "", info.help or "")
        else:
            yield Parameter(name, _spellings(info, name, is_switch=not count), value, count, is_required,
                            _default(info, declared.default), info.help or "")  # fmt: skip


def _spellings(info: OptionInfo, name: str, *, is_switch: bool) -> tuple[str, ...]:
    # In annotations typer takes the first spelling for what it would otherwise be, the default.
    declared = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
    given = tuple(each for one in declared for each in one.split("/") if each.startswith("-"))
    plain = name.replace("_", "-")
    return given or ((f"--{plain}", f"--no-{plain}") if is_switch else (f"--{plain}",))


def _value(kind: Any, info: Any, name: str) -> tuple[str, int]:
    """What stands for a parameter's value, and how many values it takes: none, where it is a switch."""
    kinds = [each for each in get_args(kind) if each is not NoneType] if NoneType in get_args(kind) else [kind]
    if kinds == [bool]:
        return "", 0
    count = len(get_args(kinds[0])) if get_origin(kinds[0]) is tuple else 1
    if info.metavar:
        return info.metavar, count
    if get_origin(kinds[0]) is Literal:
        return "|".join(map(str, get_args(kinds[0]))), count
    enumerated = getattr(kinds[0], "__members__", None)
    if enumerated:
        return "|".join(str(each.value) for each in enumerated.values()), count
    return name.upper().replace("_", "-"), count


def _default(info: OptionInfo, default: Any) -> str:
    variables = info.envvar if isinstance(info.envvar, list | tuple) else [info.envvar]
    shown = [] if default in (None, False, (), inspect.Parameter.empty) else [code(default)]
    return " or ".join([*(code(each) for each in variables if each), *shown])
