"""The page of the algorithms' hyperparameters, of the models that validate them."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc

from documents.markdown import code, docstring, made_by, table
from documents.schemas import fields
from freestep.api.hyperparameters import ALGORITHMS

__all__ = ["pages"]


def pages() -> Iterator[tuple[str, str]]:
    """The page by its name."""
    parts = [
        made_by("make reference", "Of the models of hyperparameters"),
        "# Hyperparameters\n\nThe algorithms by name, with what each takes and its default. What they compute is in"
        " [algorithms](../algorithms.md).\nA param group may have values of its own.\n",
    ]
    for name, model in ALGORITHMS.items():
        schema = model.model_json_schema()
        schema["properties"].pop("algorithm")
        rows = [row for row in fields(schema, "json.md")]
        parts.append(f"## {name}\n\n{docstring(cleandoc(model.__doc__ or ''))}")
        parts.append(table((code("name"), "is", "default", ""), rows))
    yield "hyperparameters.md", "\n".join(parts)
