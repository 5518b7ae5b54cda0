"""The page of the service's settings, of their declarations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from documents.markdown import code, made_by, table
from documents.schemas import kind
from freestep_service.settings import Settings

__all__ = ["pages"]


def pages() -> Iterator[tuple[str, str]]:
    """The page by its name."""
    yield "settings.md", _settings()


def _settings() -> str:
    schema = Settings.model_json_schema()
    rows = [
        (
            code("--" + name.replace("_", "-")),
            _kind(schema["properties"][name]),
            _default(field),
            field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(
        (
            made_by("make reference", "Of the settings' declarations"),
            "# Settings\n\nEach setting of `freestep serve` is a flag, and an environment variable: `--data-dir` is"
            " `FREESTEP_DATA_DIR`. A flag\nthat is no value, such as `--insecure`, is `true` or `false` in the"
            " environment. Where a setting is wrong, the service\ndoes not start, and exits with 2. The variables of"
            " clients are in [a worker](../guides/worker.md#environment).\n",
            table(("flag", "is", "default", ""), rows),
        )
    )


def _kind(schema: dict[str, Any]) -> str:
    """What a setting may be; a setting without a default may be left out, and need not be told to be null."""
    return kind(schema, "").removesuffix(" or null")


def _default(field: Any) -> str:
    if field.is_required() or field.default is None or field.default == "":
        return ""
    return code(str(field.default).lower() if isinstance(field.default, bool) else field.default)
