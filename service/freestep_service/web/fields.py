"""Fields of requests: each is defined once, for the parser of the hot endpoints and for the OpenAPI document.

FastAPI's dependency injection, which would do both, costs about as much as the rest of a small push.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, Generic, TypeVar, cast

from starlette.requests import Request

from freestep.errors import MalformedRequest

__all__ = [
    "LARGEST",
    "Field",
    "Header",
    "Kind",
    "PathField",
    "Query",
    "choice",
    "decimal",
    "flag",
    "integer",
    "number",
    "pattern",
    "text",
]

T = TypeVar("T")

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
LARGEST = 10**18 - 1
"""Of an integer: it fits into 64 bits."""


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a field may hold: its JSON schema, and how its text is parsed. `parse` raises ValueError for other text."""

    schema: Mapping[str, Any]
    parse: Callable[[str], T]
    expected: str
    """What the text has to be, as a refusal words it."""


@dataclass(frozen=True)
class Field(Generic[T]):
    """A field by its name on the wire. Subclasses say where in a request it stands."""

    name: str
    kind: Kind[T]
    description: str = ""
    default: T | None = None
    required: bool = False
    example: Any = None

    place = ""

    def parse(self, text: str) -> T:
        """Raises MalformedRequest, naming the field."""
        try:
            return self.kind.parse(text)
        except ValueError:
            raise MalformedRequest(f"{self.name}: must be {self.kind.expected}", field=self.name) from None

    def document(self) -> dict[str, Any]:
        """The field as an OpenAPI parameter."""
        schema = dict(self.kind.schema) | ({} if self.default is None else {"default": self.default})
        document = {"name": self.name, "in": self.place, "required": self.required, "schema": schema}
        document |= {"description": self.description} if self.description else {}
        return document if self.example is None else {**document, "example": self.example}


class PathField(Field[T]):
    """A segment of the path."""

    place = "path"

    def read(self, request: Request) -> T:
        """Raises MalformedRequest."""
        return self.parse(request.path_params[self.name])


class Query(Field[T]):
    """A query parameter. It may stand once."""

    place = "query"

    def find(self, request: Request) -> T | None:
        """The value; where it is absent, the default, or None. Raises MalformedRequest."""
        values = request.query_params.getlist(self.name)
        if len(values) > 1:
            raise MalformedRequest(f"the query parameter {self.name} stands more than once", field=self.name)
        return self.parse(values[0]) if values else self.default

    def read(self, request: Request) -> T:
        """As `find`, of a field with a default."""
        return cast(T, self.find(request))


@dataclass(frozen=True)
class Header(Field[T]):
    """A header. It may stand once, unless it is a list (RFC 9110, section 5.3)."""

    is_list: bool = False

    place = "header"

    @cached_property
    def key(self) -> bytes:
        """The name as it stands in an ASGI scope."""
        return self.name.lower().encode()

    def find(self, request: Request) -> T | None:
        """The value; where it is absent, the default, or None. Raises MalformedRequest."""
        key = self.key
        values = [value for name, value in request.scope["headers"] if name == key]
        if not values:
            if self.required:
                raise MalformedRequest(f"the header {self.name} is missing", field=self.name)
            return self.default
        if len(values) > 1 and not self.is_list:
            raise MalformedRequest(f"the header {self.name} stands more than once", field=self.name)
        return self.parse(b",".join(values).decode("latin-1").strip())

    def read(self, request: Request) -> T:
        """As `find`, of a field that is required or has a default."""
        return cast(T, self.find(request))


def integer(least: int, most: int = LARGEST) -> Kind[int]:
    """An integer of at most 18 digits from `least` to `most`."""

    def parse(text: str) -> int:
        if _INTEGER.fullmatch(text) is None or not least <= (value := int(text)) <= most:
            raise ValueError
        return value

    schema = {"type": "integer", "minimum": least, "maximum": most}
    return Kind(schema, parse, f"an integer from {least} to {most}")


def decimal(text: str) -> float:
    """A number in decimal notation, without what else Python takes for one. Raises ValueError."""
    if _NUMBER.fullmatch(text) is None:
        raise ValueError
    return float(text)


def number(schema: Mapping[str, Any], is_valid: Callable[[float], bool], expected: str) -> Kind[float]:
    """A finite number for which `is_valid` holds."""

    def parse(text: str) -> float:
        value = decimal(text)
        if not isfinite(value) or not is_valid(value):
            raise ValueError
        return value

    return Kind({"type": "number", **schema}, parse, expected)


def choice(options: tuple[T, ...]) -> Kind[T]:
    """One of some words."""
    by_text = {str(option): option for option in options}

    def parse(text: str) -> T:
        try:
            return by_text[text]
        except KeyError:
            raise ValueError from None

    return Kind({"type": "string", "enum": list(options)}, parse, f"one of {', '.join(by_text)}")


def flag() -> Kind[bool]:
    """true or false."""
    words = choice(("true", "false"))
    return Kind({"type": "boolean"}, lambda text: words.parse(text) == "true", words.expected)


def pattern(expression: str, expected: str) -> Kind[str]:
    """Text that an expression matches as a whole."""
    compiled = re.compile(expression)

    def parse(text: str) -> str:
        if compiled.fullmatch(text) is None:
            raise ValueError
        return text

    return Kind({"type": "string", "pattern": f"^{expression}$"}, parse, expected)


def text(least: int = 0, most: int | None = None) -> Kind[str]:
    """Any text of `least` to `most` characters."""

    def parse(text: str) -> str:
        if len(text) < least or (most is not None and len(text) > most):
            raise ValueError
        return text

    bounds = ({"minLength": least} if least else {}) | ({} if most is None else {"maxLength": most})
    return Kind({"type": "string", **bounds}, parse, f"{least} to {most} characters" if most else "text")
