"""Checkov's policies for Kubernetes hold for what the chart renders; what does not is here, with the reason."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from chart.rendered import MATRIX, ROOT, containers, manifests, render

SERVES_NOTHING = "it serves nothing that could be asked; the service knows its health, by its lease"
ENDS = "it ends by itself, and its exit code says how it went"
KEPT: dict[tuple[str, str], str] = {
    ("CKV_K8S_8", "workers"): SERVES_NOTHING,
    ("CKV_K8S_9", "workers"): SERVES_NOTHING,
    ("CKV_K8S_8", "evaluator"): SERVES_NOTHING,
    ("CKV_K8S_9", "evaluator"): SERVES_NOTHING,
    ("CKV_K8S_8", "test"): ENDS,
    ("CKV_K8S_9", "test"): ENDS,
    ("CKV_K8S_35", "shards"): "an object store's package reads its credentials from variables: shards.envFrom",
    ("CKV_K8S_43", "redis"): "the digest is the values' to pin, as redis.builtin.image",
    ("CKV_K8S_22", "workers"): "an image of the user's may need to write: workers.readOnlyRootFilesystem",
}
"""Why a policy is not kept, by the policy and by what the pods are for. One that is kept after all fails the test."""
PINNED = "@sha256:" + "0" * 64


@pytest.mark.slow
def test_policies_hold_but_for_what_has_a_reason(tmp_path: Path) -> None:
    checkov = ROOT / ".venv" / "policies" / "bin" / "checkov"
    if not checkov.exists():
        pytest.skip("Checkov is not installed: `make chart` installs it and runs this")
    components = {}
    for name, values in MATRIX.items():
        values = json.loads(json.dumps(values).replace("worker:1", f"worker:1{PINNED}"))
        values.setdefault("image", {}).update(tag=f"0.1.0{PINNED}", pullPolicy="Always")
        values.setdefault("shards", {}).setdefault("gpu", {}).setdefault("image", {})["tag"] = f"0.1.0-cuda{PINNED}"
        # Set in values, as they have to be for a good reason to leave them out.
        values["shards"].pop("resources", None)
        for kind in ("workers", "evaluator"):
            if kind in values:
                values[kind]["imagePullPolicy"] = "Always"
        file = tmp_path / f"{name.replace(' ', '-')}.yaml"
        file.write_text(render(values))
        for each in containers(manifests(values)):
            metadata = each.manifest["metadata"]
            resource = f"{each.manifest['kind']}.{metadata['namespace']}.{metadata['name']}"
            components[f"/{file.name}", resource] = each.component
    command = [str(checkov), "--directory", str(tmp_path), "--framework", "kubernetes", "--output", "json", "--quiet"]
    done = subprocess.run([*command, "--compact"], capture_output=True, text=True, timeout=170)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 500 and not report["summary"]["parsing_errors"], report["summary"]
    failed = {
        (each["check_id"], components.get((each["file_path"], each["resource"]), each["resource"])): each["check_name"]
        for each in report["results"]["failed_checks"]
    }
    assert {each: failed[each] for each in failed.keys() - KEPT.keys()} == {}
    assert KEPT.keys() - failed.keys() == set(), "these hold by now: remove them"
