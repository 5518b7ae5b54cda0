"""What containers are told by reference: variables of the environment, from Secrets, ConfigMaps and the pod itself."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import ceil
from typing import Any

from pods.fields import Unsupported, known

__all__ = ["Objects", "data_of", "environment", "expanded", "field_of", "ports_of", "quantity", "selected"]

Objects = Mapping[tuple[str, str], Mapping[str, Any]]
"""A cluster's objects by kind and name."""

_FACTORS = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_FACTORS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_LABEL = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


def environment(container: Mapping[str, Any], pod: Mapping[str, Any], objects: Objects) -> dict[str, str]:
    """A container's variables. Raises Unsupported, and KeyError for a reference that leads nowhere and may not.

    pod: the manifest, with what is known of it before its containers run: name, namespace, labels, node, address.
    """
    found: dict[str, str] = {}
    where = f"env of {container['name']}"
    for source in container.get("envFrom", []):
        known(source, where, "prefix", "secretRef", "configMapRef")
        for kind, reference in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
            if reference in source:
                data = data_of(objects, kind, source[reference]) or {}
                found |= {source.get("prefix", "") + name: value.decode() for name, value in data.items()}
    for variable in container.get("env", []):
        known(variable, where, "name", "value", "valueFrom")
        if "valueFrom" not in variable:
            found[variable["name"]] = expanded(str(variable.get("value") or ""), found)
            continue
        value = _referred(variable["valueFrom"], container, pod, objects, where)
        if value is not None:
            found[variable["name"]] = value
    return found


def _referred(
    source: Mapping[str, Any], container: Mapping[str, Any], pod: Mapping[str, Any], objects: Objects, where: str
) -> str | None:
    known(source, where, "secretKeyRef", "configMapKeyRef", "fieldRef", "resourceFieldRef")
    for kind, reference in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
        if reference in source:
            data = data_of(objects, kind, source[reference])
            key = source[reference]["key"]
            if (data is None or key not in data) and source[reference].get("optional"):
                return None
            return (data or {})[key].decode()
    if "fieldRef" in source:
        return field_of(pod, source["fieldRef"]["fieldPath"])
    wanted = source["resourceFieldRef"]
    amounts = container.get("resources", {})
    kind, _, name = wanted["resource"].partition(".")
    amount = amounts.get(kind, {}).get(name)
    if amount is None:
        raise Unsupported(f"{where}: {wanted['resource']} is not set, and would be the node's")
    return str(ceil(quantity(amount) / quantity(wanted.get("divisor") or "1")))


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """A text with $(NAME) replaced where the name is known; $$ is a dollar."""
    return re.sub(
        r"\$\$|\$\(([^)]+)\)",
        lambda match: "$" if match[1] is None else variables.get(match[1], match[0]),
        text,
    )


def data_of(objects: Objects, kind: str, reference: Mapping[str, Any]) -> dict[str, bytes] | None:
    """What a Secret or a ConfigMap has; None if it is optional and not there. Raises KeyError."""
    found = objects.get((kind, reference.get("name") or reference["secretName"]))
    if found is None:
        if reference.get("optional"):
            return None
        raise KeyError(f"there is no {kind} {reference.get('name') or reference['secretName']}")
    data = {name: base64.b64decode(value) for name, value in (found.get("data") or {}).items()}
    if kind == "ConfigMap":
        data = {name: value.encode() for name, value in (found.get("data") or {}).items()}
        return data | {name: base64.b64decode(value) for name, value in (found.get("binaryData") or {}).items()}
    return data | {name: value.encode() for name, value in (found.get("stringData") or {}).items()}


def field_of(pod: Mapping[str, Any], path: str) -> str:
    """A field of a pod's as the downward API gives it. Raises Unsupported."""
    if match := _LABEL.fullmatch(path):
        return str(pod["metadata"].get(match[1], {}).get(match[2], ""))
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
