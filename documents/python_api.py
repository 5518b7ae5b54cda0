"""The page of the Python API, of the docstrings of what `freestep` exports."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

from pydantic import BaseModel

import freestep
from documents.markdown import code, docstring, made_by
from freestep.errors import FreestepError

__all__ = ["pages"]

_INTEGRATIONS = ("freestep.integrations.transformers", "freestep.integrations.lightning")
_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_WIDEST = 100
"""Characters of a signature that stays on one line."""


def pages() -> Iterator[tuple[str, str]]:
    """The page by its name."""
    exported = [(name, getattr(freestep, name)) for name in sorted(freestep.__all__, key=str.lower)]
    classes = [each for each in exported if inspect.isclass(each[1]) and not _is_error(each[1])]
    functions = [each for each in exported if inspect.isfunction(each[1])]
    errors = [each for each in exported if _is_error(each[1])]
    parts = [
        made_by("make reference", "Of the docstrings"),
        "# The Python API\n\nWhat `import freestep` has: the classes, the functions and the errors; and what"
        " `freestep.integrations` adds.\n",
        *(_class(name, each) for name, each in classes),
        "## Functions\n",
        *(_callable(name, each, "###") for name, each in functions),
        *_integrations(),
        "## Errors\n",
        *(_error(name, each) for name, each in errors),
    ]
    yield "python.md", "\n".join(parts)


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, FreestepError)


def _integrations() -> Iterator[str]:
    for module_name in _INTEGRATIONS:
        module = importlib.import_module(module_name)
        yield f"## {module_name}\n\n{docstring(inspect.getdoc(module) or '')}"
        for name in module.__all__:
            each = getattr(module, name)
            yield _callable(name, each, "###")


def _class(name: str, owner: type) -> str:
    parts = [f"## {name}\n"]
    if issubclass(owner, BaseModel):
        parts.append(docstring(inspect.getdoc(owner) or ""))
        parts += [f"- {code(field)}: {' '.join((info.description or _kinds(info)).split())}"
                  for field, info in owner.model_fields.items()]  # fmt: skip
        parts.append("")
    else:
        parts.append(_signature(name, owner) + docstring(inspect.getdoc(owner) or ""))
    inherited: dict[str, list[str]] = {}
    for member, definer, value in _members(owner):
        if definer is not owner and definer.__name__ in freestep.__all__:
            inherited.setdefault(definer.__name__, []).append(member)
        else:
            parts.append(_callable(f"{name}.{member}", value, "###"))
    parts += [
        f"From [{definer}](#{definer.lower()}): {', '.join(map(code, members))}.\n"
        for definer, members in inherited.items()
    ]
    return "\n".join(parts)


def _kinds(info: Any) -> str:
    """What a field without a description may be; its name says the rest."""
    return ", ".join(map(str, get_args(info.annotation))) or "see the JSON page"


def _members(owner: type) -> Iterator[tuple[str, type, Any]]:
    """The public methods and properties of a class that are freestep's own, with the class that defines each."""
    for name in sorted(dir(owner)):
        definer = next((each for each in owner.__mro__ if _defines(each, name)), owner)
        if name.startswith("_") or not definer.__module__.startswith("freestep"):
            continue
        member = vars(definer)[name]
        member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(member) or isinstance(member, property):
            yield name, definer, member


def _defines(owner: type, name: str) -> bool:
    """Whether a class has a member of its own: torch gives a class that is used a wrapper of its base's step."""
    value = _unwrapped(owner, name)
    return name in vars(owner) and not any(_unwrapped(base, name) is value for base in owner.__mro__[1:])


def _unwrapped(owner: type, name: str) -> Any:
    value = vars(owner).get(name)
    return inspect.unwrap(value) if inspect.isfunction(value) else value


def _callable(name: str, value: Any, level: str) -> str:
    signature = "" if isinstance(value, property) else _signature(name, value)
    return f"{level} {name}\n\n{signature}{docstring(inspect.getdoc(value) or '')}"


def _error(name: str, error: type[Exception]) -> str:
    slug = vars(error).get("slug")
    page = f"\nThe service's refusal [{slug}](problems/{slug}.md).\n" if slug else ""
    return f"### {name}\n\n{docstring(inspect.getdoc(error) or '')}{page}"


def _signature(name: str, value: Callable[..., Any]) -> str:
    """The signature as a block of code, without annotations that only repeat the text, and without `self`."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return ""
    shown: list[str] = []
    is_keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
            is_keyword_only = True
            if not any(each.startswith("*") for each in shown):
                shown.append("*")
        star = _STARS.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        shown.append(f"{star}{parameter.name}{default}")
    text = f"{name}({', '.join(shown)})"
    if len(text) > _WIDEST:
        text = f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"
    return f"```text\n{text}\n```\n\n"


def _default(value: Any) -> str:
    """A default, without what differs from process to process."""
    return re.sub(r"<(.*) object at 0x[0-9a-f]+>", "...", repr(value))
