"""Every public name, parameter and field is documented.

Parameters stand in the section "Args:" of a docstring, those of a constructor in the class's; fields of models have a
docstring below them, or a description.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

import freestep
import freestep.api
from freestep.bulk import BulkTransport
from freestep_service.app import create_app
from freestep_service.settings import Settings

CLASSES = [each for name in freestep.__all__ if inspect.isclass(each := getattr(freestep, name))] + [BulkTransport]
"""The classes that users meet."""


def models() -> Iterator[type[BaseModel]]:
    """The models of the JSON API, hyperparameters among them."""
    for module in pkgutil.iter_modules(freestep.api.__path__):
        for name, each in vars(importlib.import_module(f"freestep.api.{module.name}")).items():
            is_own = inspect.isclass(each) and each.__module__ == f"freestep.api.{module.name}"
            if is_own and issubclass(each, BaseModel) and not name.startswith("_"):
                yield each


def members() -> Iterator[tuple[str, Any]]:
    """The public methods and properties of these classes that are freestep's own, by their names."""
    for owner in CLASSES:
        for name in dir(owner):
            definer = next((each for each in owner.__mro__ if name in vars(each)), owner)
            is_own = definer.__module__.startswith("freestep")
            if is_own and not name.startswith("_") and (member := vars(definer)[name]) is not None:
                member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                if inspect.isfunction(member) or isinstance(member, property):
                    yield f"{owner.__name__}.{name}", getattr(owner, name)


def parameters(function: Callable[..., Any]) -> list[str]:
    """What a call takes, as its docstring names it."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    listed = inspect.signature(function).parameters.values()
    return [stars.get(each.kind, "") + each.name for each in listed if each.name not in ("self", "cls")]


def documented(docstring: str) -> list[str]:
    """The names in the section "Args:" of a docstring, each with a text behind it."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", docstring + "\n", re.MULTILINE)
    return re.findall(r"^    (\*{0,2}\w+): \S", section[1], re.MULTILINE) if section else []


def names(pairs: Iterator[tuple[str, Any]]) -> list[Any]:
    return [pytest.param(each, id=name) for name, each in pairs]


@pytest.mark.parametrize("owner", CLASSES, ids=lambda each: each.__name__)
def test_a_class_and_what_its_constructor_takes_are_documented(owner: type) -> None:
    assert owner.__doc__
    is_own = any("__init__" in vars(each) and each.__module__.startswith("freestep") for each in owner.__mro__)
    if is_own and not issubclass(owner, BaseModel) and "__init__" in vars(owner):
        assert documented(inspect.getdoc(owner) or "") == parameters(owner.__init__)


@pytest.mark.parametrize("member", names(members()))
def test_a_method_and_what_it_takes_are_documented(member: Any) -> None:
    docstring = inspect.getdoc(member)
    assert docstring
    if not isinstance(member, property):
        assert documented(docstring) == parameters(member)


@pytest.mark.parametrize("model", [*models(), Settings], ids=lambda each: each.__name__)
def test_a_model_and_its_fields_are_documented(model: type[BaseModel]) -> None:
    assert vars(model).get("__doc__")
    # A field of a single value, which tells a model from others, needs no explanation.
    fields = {
        name: field
        for name, field in model.model_fields.items()
        if not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1)
    }
    assert [name for name, field in fields.items() if not (field.description or "").strip()] == []


def test_the_application_is_documented() -> None:
    docstring = inspect.getdoc(create_app) or ""
    assert [name for name in parameters(create_app) if name not in docstring] == []


@pytest.mark.parametrize("owner", CLASSES, ids=lambda each: each.__name__)
def test_examples_are_python(owner: type) -> None:
    for example in doctest.DocTestParser().get_examples(inspect.getdoc(owner) or ""):
        compile(example.source, owner.__name__, "exec")


@pytest.mark.parametrize(
    "name", ["Client", "Run", "RemoteOptimizer", "LocalSteps", "Flat", "Rounded", "HeldLease", "RunSpec"]
)
def test_what_users_begin_with_has_an_example(name: str) -> None:
    assert doctest.DocTestParser().get_examples(inspect.getdoc(getattr(freestep, name)) or "")
