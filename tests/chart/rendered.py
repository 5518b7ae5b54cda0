"""The chart as a real Helm renders it, for the values of a matrix, and its containers as a node would start them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "freestep"
RELEASE, NAMESPACE = "freestep", "train"

Manifest = dict[str, Any]

MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "journal": {
        "shards": {"durability": "journal", "settings": {"journal-wait-seconds": "inf", "log-format": "json"}},
        "persistence": {"journal": {"enabled": True, "storageClass": "local-nvme", "size": "100Gi"}},
    },
    "without claims": {
        "persistence": {"enabled": False},
        "checkpoints": {"kind": "object", "object": {"url": "s3://bucket/folder"}},
        "shards": {"host": "::", "envFrom": [{"secretRef": {"name": "bucket"}}], "resources": {}},
        "networkPolicy": {"enabled": False},
    },
    "several": {
        "shards": {
            "replicas": 3,
            "durability": "journal",
            "settings": {"checkpoint-seconds": 60, "journal-max-bytes": 4294967296, "traces": False},
            "extraEnv": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
        },
        "checkpoints": {"kind": "shared", "shared": {"storageClass": "files"}},
        "redis": {"builtin": {"enabled": True}},
        "workers": {
            "enabled": True,
            "image": "registry.example.org/worker:1",
            "command": ["python", "-m", "freestep.demo.worker"],
            "run": "demo",
            "replicas": 3,
            "spot": True,
            "sharedMemory": "1Gi",
        },
        "evaluator": {
            "enabled": True,
            "image": "registry.example.org/worker:1",
            "command": ["python", "-m", "freestep.demo.evaluator"],
        },
        "reshard": {"run": "demo", "shards": 6},
    },
    "your own": {
        "fullnameOverride": "fs",
        "imagePullSecrets": [{"name": "registry"}],
        "image": {"repository": "registry.example.org/freestep-service"},
        "shards": {
            "replicas": 2,
            "gpu": {"count": 4},
            "nodeSelector": {"accelerator": "yes"},
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "high",
        },
        "checkpoints": {"kind": "shared", "shared": {"existingClaim": "there"}},
        "redis": {
            "url": "rediss://trainer@redis.example.org:6379/0",
            "passwordSecret": {"name": "redis"},
            "caSecret": {"name": "redis-ca"},
        },
        "service": {
            "type": "LoadBalancer",
            "port": 443,
            "allowedHosts": ["train.example.org", "192.0.2.7", "[2001:db8::7]", "*.example.net", "train-*.example.com"],
            "trustedProxies": ["10.0.0.0/8"],
            "annotations": {"a": "b"},
        },
        "tls": {"enabled": True, "certManager": {"issuerRef": {"name": "ca", "kind": "ClusterIssuer"}}},
        "tokens": {"existingSecret": "tokens"},
        "workers": {
            "enabled": True,
            "kind": "Job",
            "image": "registry.example.org/worker:1",
            "run": "large",
            "replicas": 4,
            "job": {"completions": 16},
            "gpu": {"count": 1},
            "readOnlyRootFilesystem": False,
            "volumes": [{"name": "images", "persistentVolumeClaim": {"claimName": "images", "readOnly": True}}],
            "volumeMounts": [{"name": "images", "mountPath": "/images"}],
        },
        "reshard": {"run": "large", "shards": 8},
    },
    "accounts and monitoring": {
        "oidc": {
            "enabled": True,
            "rules": [{"claim": ["kubernetes.io", "namespace"], "matches": "ml-*", "scope": "read"}],
        },
        "tls": {"enabled": True, "secretName": "certificate"},
        "redis": {"url": "redis://redis:6379"},
        "workers": {
            "enabled": True,
            "image": "registry.example.org/worker:1",
            "run": 'de"mo',
            "autoscaling": {"enabled": True, "prometheus": "http://prometheus:9090", "authentication": "prometheus"},
        },
        "monitoring": {
            "serviceMonitor": {"enabled": True, "tokenSecret": {"name": "read"}, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True},
            "dashboard": {"enabled": True},
        },
    },
}
VALUES = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
"""Has a test be of each of them."""
"""Values, by what they are about: between them every template, and both sides of every condition in one."""


def helm() -> Any:
    """The module of Helm, which ends the test where it cannot be had."""
    return pytest.importorskip("helm_python", reason="Helm is not installed: `make chart` installs it and runs this")


def render(values: Mapping[str, Any], folder: Path = CHART, release: str = RELEASE) -> str:
    """All documents that a chart makes of values, notes aside. Raises helm_python.HelmError."""
    with helm().Chart.load(folder) as chart:
        files = chart.render(dict(values), name=release, namespace=NAMESPACE)
    return "\n---\n".join(text for name, text in sorted(files.items()) if not name.endswith("NOTES.txt"))


def notes(values: Mapping[str, Any]) -> str:
    """What Helm prints after an installation."""
    with helm().Chart.load(CHART) as chart:
        return str(chart.render(dict(values), name=RELEASE, namespace=NAMESPACE)["freestep/templates/NOTES.txt"])


def manifests(values: Mapping[str, Any], folder: Path = CHART, release: str = RELEASE) -> list[Manifest]:
    """What a chart makes of values."""
    import yaml

    return [each for each in yaml.safe_load_all(render(values, folder, release)) if each]


def only(found: list[Manifest], kind: str, name: str = "") -> Manifest:
    """The one manifest of a kind whose name ends so."""
    (one,) = (each for each in found if each["kind"] == kind and each["metadata"]["name"].endswith(name))
    return one


@dataclass(frozen=True)
class Container:
    """A container of a pod."""

    manifest: Manifest
    """That of the pod, or of what makes pods."""
    pod: dict[str, Any]
    """The specification of the pod."""
    spec: dict[str, Any]

    @property
    def component(self) -> str:
        """What the pod is for."""
        return str(self.labels["app.kubernetes.io/component"])

    @property
    def labels(self) -> dict[str, str]:
        """Those of the pod."""
        manifest = self.manifest if self.manifest["kind"] == "Pod" else self.manifest["spec"]["template"]
        return dict(manifest["metadata"]["labels"])

    def variables(self) -> dict[str, dict[str, Any]]:
        """The variables of its environment, by name."""
        return {each["name"]: each for each in self.spec.get("env", ())}

    def environment(self, pod_name: str, secrets: Mapping[str, str]) -> dict[str, str]:
        """Its environment as a node makes it; `secrets` are values of Secrets by their keys."""
        found: dict[str, str] = {}
        for name, each in self.variables().items():
            if "value" in each:
                found[name] = re.sub(r"\$\((\w+)\)", lambda match: found.get(match[1], match[0]), each["value"])
                continue
            source = each["valueFrom"]
            if "fieldRef" in source:
                assert source["fieldRef"]["fieldPath"] == "metadata.name"
                found[name] = pod_name
            elif "resourceFieldRef" in source:
                assert source["resourceFieldRef"]["resource"] == "limits.cpu"
                limit = str(self.spec["resources"]["limits"]["cpu"])
                found[name] = str(ceil(float(limit[:-1]) / 1000 if limit.endswith("m") else float(limit)))
            else:
                found[name] = secrets[source["secretKeyRef"]["key"]]
        return found

    def mounts(self) -> dict[str, str]:
        """The paths where volumes are mounted, by the volumes' names."""
        return {each["name"]: each["mountPath"] for each in self.spec.get("volumeMounts", ())}


def containers(found: list[Manifest]) -> Iterator[Container]:
    """All containers of manifests."""
    for manifest in found:
        spec = (
            manifest["spec"] if manifest["kind"] == "Pod" else manifest.get("spec", {}).get("template", {}).get("spec")
        )
        for each in (spec or {}).get("containers", ()):
            yield Container(manifest, spec, each)


def container(values: Mapping[str, Any], component: str) -> Container:
    """The one container of a component."""
    (one,) = (each for each in containers(manifests(values)) if each.component == component)
    return one
