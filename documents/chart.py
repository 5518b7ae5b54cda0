"""What of the Helm chart is made: its README, of what values.yaml says, and in its schema the names of settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from documents.markdown import code, made_by, table
from freestep_service.settings import Settings

__all__ = ["FILE", "SCHEMA", "made", "schema"]

CHART = Path(__file__).parent.parent / "deploy" / "helm" / "freestep"
FILE = CHART / "README.md"
SCHEMA = CHART / "values.schema.json"
_HEAD = """# The chart of freestep

Shards as a StatefulSet, workers as a Deployment or a Job, an evaluator, and Redis from elsewhere or beside them. How it
is used, what was tried and what was not is in [the guide](../../../docs/guides/kubernetes.md). Values that cannot work
together are refused when the chart is rendered.

```bash
helm install freestep deploy/helm/freestep --namespace train --create-namespace \\
    --set image.repository=registry.example.org/freestep-service
helm test freestep --namespace train
```

## Values
"""
_DESCRIPTION = re.compile(r"\s*# (-- )?(.*)")


def schema() -> str:
    """The text of the schema of values: as it is, with the settings that the service has now."""
    document = json.loads(SCHEMA.read_text())
    settings = document["properties"]["shards"]["properties"]["settings"]
    settings["properties"] = {
        name.replace("_", "-"): {"$ref": "#/definitions/setting"} for name in sorted(Settings.model_fields)
    }
    return json.dumps(document, indent=2) + "\n"


def made() -> str:
    """The text of the README."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    rows = [(code(name), code(default), text) for name, default, text in _values(yaml.compose("\n".join(lines)), lines)]
    return "\n".join((made_by("make reference", "Of values.yaml"), _HEAD, table(("value", "default", ""), rows)))


def _values(node: yaml.MappingNode, lines: list[str], place: str = "") -> Iterator[tuple[str, str, str]]:
    """Each value's name, default and description. An object that is described, or stands in a line, is one value."""
    for key, value in node.value:
        name, text = f"{place}{key.value}", _description(lines[: key.start_mark.line])
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style and not text:
            yield from _values(value, lines, f"{name}.")
        else:
            yield name, json.dumps(yaml.safe_load(yaml.serialize(value))), text


def _description(above: list[str]) -> str:
    """What the comment says that ends the lines above a key, if it begins as a description does."""
    found: list[str] = []
    for line in reversed(above):
        match = _DESCRIPTION.fullmatch(line)
        if match is None:
            return ""
        found.insert(0, match[2])
        if match[1]:
            return " ".join(found)
    return ""
