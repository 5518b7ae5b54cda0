"""The chart as a release on the cluster: values of the tests', rendered by Helm, and changed as `helm upgrade` does."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Mapping
from typing import Any

from chart.rendered import RELEASE, manifests
from freestep.api.token_form import make_token
from harness import TOKEN
from pods.cluster import Cluster
from pods.images import WORK
from pods.pod import Pod

__all__ = ["LENGTH", "REDIS", "SHARDS", "WORKERS", "Release"]

SHARDS, WORKERS, REDIS = f"{RELEASE}-shards", f"{RELEASE}-workers", f"{RELEASE}-redis"
LENGTH = 20_000
"""Examples of a run that counts, more than are pushed while a test runs."""
_TOKENS, _PASSWORD = "own-tokens", "own-password"
_PUSH = make_token("push")
_SMALL = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}


class Release:
    """A release of two processes of the service and a Valkey, without workers until there are to be some.

    shards: further values of `shards`.
    """

    def __init__(self, cluster: Cluster, **shards: Any) -> None:
        self.cluster = cluster
        image = cluster.images.service()
        self.values: dict[str, Any] = {
            "image": {"repository": image.repository, "tag": image.tag},
            "shards": {"replicas": 2, "resources": _SMALL, **shards},
            "persistence": {"journal": {"enabled": True}},
            "checkpoints": {"kind": "shared"},
            "redis": {
                "builtin": {"enabled": True, "image": cluster.images.valkey().name},
                "passwordSecret": {"name": _PASSWORD},
            },
            "tokens": {"existingSecret": _TOKENS},
            "workers": {"enabled": True, "replicas": 0, "image": cluster.images.worker().name, "run": "none"},
        }
        self.values["workers"] |= {"command": ["python", WORK], "resources": _SMALL}
        self.upgrade({})

    def upgrade(self, changes: Mapping[str, Any]) -> None:
        """Changes values, and has the cluster become what the chart then renders."""
        self.values = _merged(self.values, changes)
        # What Helm runs before and after a release is none of its workloads.
        self.cluster.apply([*(each for each in manifests(self.values) if _hook(each) is None), *_secrets()])

    def test(self) -> Pod:
        """Runs the pod of `helm test`; returns it, which has ended."""
        (pod,) = (each for each in manifests(self.values) if _hook(each) == "test")
        return self.cluster.run(pod)

    def train(self, run: str, workers: int, kind: str, length: int, runs: Mapping[str, Mapping[str, Any]]) -> None:
        """Has so many workers train runs that count: their names are `run`, a hyphen and an end.

        kind: "Deployment", or "Job" for as many indices.
        length: The examples of each run.
        runs: options of each for freestep.RemoteOptimizer, by these ends.
        """
        told = {"name": "COUNTING", "value": json.dumps({"length": length, "runs": runs})}
        job = {"completions": max(1, workers)}
        self.upgrade({"workers": {"kind": kind, "replicas": workers, "job": job, "run": run, "extraEnv": [told]}})


def _hook(document: Mapping[str, Any]) -> str | None:
    """When Helm makes a document that is no part of the release."""
    found = document["metadata"].get("annotations", {}).get("helm.sh/hook")
    return None if found is None else str(found)


def _secrets() -> list[dict[str, Any]]:
    """The Secrets that the chart would have a Job make at the API server."""
    tokens = {"admin-token": TOKEN, "push-token": _PUSH}
    data = {_TOKENS: tokens, _PASSWORD: {"password": "c0ffee"}}
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name},
            "data": {key: base64.b64encode(value.encode()).decode() for key, value in values.items()},
        }
        for name, values in data.items()
    ]


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(values))
    for name, change in changes.items():
        is_nested = isinstance(change, Mapping) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], change) if is_nested else copy.deepcopy(change)
    return merged
