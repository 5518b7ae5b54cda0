"""The page of the service's settings, of their declarations; and that of its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from documents.markdown import code, made_by, table
from documents.schemas import kind
from freestep_service.runs.telemetry import Metrics
from freestep_service.settings import Settings

__all__ = ["pages"]


def pages() -> Iterator[tuple[str, str]]:
    """The pages by their names."""
    yield "settings.md", _settings()
    yield "metrics.md", _metrics()


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


def _metrics() -> str:
    rows = []
    for metric in vars(Metrics()).values():
        for family in metric.describe() if hasattr(metric, "describe") else ():
            # The names of labels are nowhere else while a metric has no series.
            labels = ", ".join(map(code, metric._labelnames))
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append((code(name), family.type, labels, family.documentation))
    return "\n".join(
        (
            made_by("make reference", "Of the metrics' declarations"),
            "# Metrics\n\n`/metrics` has these in Prometheus's text format, to who has a token of scope `read`; of"
            " runs that the token is for.\nA histogram has the series `_bucket`, `_sum` and `_count`. Names and labels"
            " stay as they are in a version of the API.\n",
            table(("name", "type", "labels", ""), sorted(rows)),
        )
    )
