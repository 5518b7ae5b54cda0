"""What containers are told by reference: variables of the environment, from Secrets and the pod itself."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import ceil
from typing import Any

from pods.fields import Unsupported, known

__all__ = ["Objects", "data_of", "environment", "expanded", "ports_of", "quantity", "selected"]

Objects = Mapping[tuple[str, str], Mapping[str, Any]]
"""A cluster's objects by kind and name."""

_FACTORS = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_FACTORS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def environment(container: Mapping[str, Any], pod: Mapping[str, Any], objects: Objects) -> dict[str, str]:
    """A container's variables. Raises Unsupported, and KeyError for a reference that leads nowhere.

    pod: the manifest, with what is known of it before its containers run: name, namespace, labels, node.
    """
    found: dict[str, str] = {}
    where = f"env of {container['name']}"
    for variable in container.get("env", []):
        known(variable, where, "name", "value", "valueFrom")
        if "valueFrom" in variable:
            found[variable["name"]] = _referred(variable["valueFrom"], container, pod, objects, where)
        else:
            found[variable["name"]] = expanded(variable["value"], found)
    return found


def _referred(
    source: Mapping[str, Any], container: Mapping[str, Any], pod: Mapping[str, Any], objects: Objects, where: str
) -> str:
    known(source, where, "secretKeyRef", "fieldRef", "resourceFieldRef")
    if "secretKeyRef" in source:
        known(source["secretKeyRef"], where, "name", "key")
        return data_of(objects, source["secretKeyRef"]["name"])[source["secretKeyRef"]["key"]].decode()
    if "fieldRef" in source:
        return _field_of(pod, source["fieldRef"]["fieldPath"])
    known(source["resourceFieldRef"], where, "resource")
    kind, _, name = source["resourceFieldRef"]["resource"].partition(".")
    amount = container.get("resources", {}).get(kind, {}).get(name)
    if amount is None:
        raise Unsupported(f"{where}: {kind}.{name} is not set, and would be the node's")
    return str(ceil(quantity(amount)))


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """A text with $(NAME) replaced where the name is known; $$ is a dollar."""
    return re.sub(
        r"\$\$|\$\(([^)]+)\)",
        lambda match: "$" if match[1] is None else variables.get(match[1], match[0]),
        text,
    )


def data_of(objects: Objects, name: str) -> dict[str, bytes]:
    """What a Secret has. Raises KeyError."""
    data = objects["Secret", name]["data"]
    return {key: base64.b64decode(value) for key, value in data.items()}


def _field_of(pod: Mapping[str, Any], path: str) -> str:
    """A field of a pod's as the downward API gives it. Raises Unsupported."""
    value: Any = pod
    for name in path.split("."):
        if name not in value:
            raise Unsupported(f"the downward API's {path}")
        value = value[name]
    return str(value)


def quantity(text: str | int | float) -> Decimal:
    """A quantity of Kubernetes' as a number: 500m is a half, 1Ki is 1024. Raises Unsupported."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    if match is None or match[2] not in _FACTORS:
        raise Unsupported(f"the quantity {text}")
    return Decimal(match[1]) * _FACTORS[match[2]]


def selected(labels: Mapping[str, str], selector: Mapping[str, Any]) -> bool:
    """Whether labels fit a selector: a Service's, which is a mapping, or another's, with matchLabels."""
    wanted = selector
    if "matchLabels" in selector or "matchExpressions" in selector:
        known(selector, "selector", "matchLabels")
        wanted = selector["matchLabels"]
    return all(labels.get(name) == value for name, value in wanted.items())


def ports_of(containers: Sequence[Mapping[str, Any]], port: str | int) -> int:
    """A port's number, by its name in one of the containers."""
    if isinstance(port, int):
        return port
    named = {each.get("name"): each["containerPort"] for one in containers for each in one.get("ports", [])}
    return int(named[port])
