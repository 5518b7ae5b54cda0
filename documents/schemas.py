"""JSON schemas as Markdown: what a value may be, in a few words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from documents.markdown import code

__all__ = ["default_of", "fields", "kind"]

Schema = Mapping[str, Any]

_BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
    ("minLength", "characters: at least"),
    ("maxLength", "characters: at most"),
    ("minItems", "members: at least"),
    ("maxItems", "members: at most"),
)
_LARGEST = 10**15
"""A bound that nobody meets: those of the formats in which numbers are kept are not worth a word."""


def kind(schema: Schema, link: str) -> str:
    """What a value may be; `link` leads to the page that has the schemas by name, or is empty on that page."""
    if "$ref" in schema:
        return _reference(schema["$ref"], link)
    for several in ("oneOf", "anyOf"):
        if several in schema:
            return " or ".join(kind(each, link) for each in schema[several])
    if "const" in schema:
        return code(json.dumps(schema["const"], ensure_ascii=False))
    if "enum" in schema:
        return ", ".join(code(json.dumps(each, ensure_ascii=False)) for each in schema["enum"])
    if isinstance(schema.get("type"), list):
        return " or ".join(schema["type"])
    if "prefixItems" in schema:
        return "array of " + "; ".join(kind(each, link) for each in schema["prefixItems"])
    if "items" in schema:
        return "array of " + kind(schema["items"], link) + _bounds(schema)
    if schema.get("format") == "binary":
        return "bytes"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return "object, each member " + kind(schema["additionalProperties"], link)
    return str(schema.get("type", "any")) + _bounds(schema)


def default_of(schema: Schema) -> str:
    """The default, as JSON; no text where there is none."""
    return code(json.dumps(schema["default"], ensure_ascii=False)) if "default" in schema else ""


def fields(schema: Schema, link: str) -> Iterator[tuple[str, str, str, str]]:
    """Of an object's members: name, what it may be, default or that it is required, and description."""
    required = schema.get("required", ())
    for name, member in schema.get("properties", {}).items():
        default = "required" if name in required and "default" not in member else default_of(member)
        yield code(name), kind(member, link), default, member.get("description", "")


def _reference(reference: str, link: str) -> str:
    name = reference.rpartition("/")[2]
    return f"[{name}]({link}#{name.lower()})"


def _bounds(schema: Schema) -> str:
    found = [
        f"{words} {schema[name]:,g}" if isinstance(schema[name], float) else f"{words} {schema[name]:,}"
        for name, words in _BOUNDS
        if name in schema and abs(schema[name]) < _LARGEST
    ]
    return f", {', '.join(found)}" if found else ""
