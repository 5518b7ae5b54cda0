"""What the guide to Kubernetes says of the chart works."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from chart.rendered import ROOT, container, manifests
from pages.blocks import blocks_of


def test_values_in_the_guide_work_with_each_other() -> None:
    yaml = pytest.importorskip("yaml")
    blocks = [yaml.safe_load(each.text) for each in blocks_of("docs/guides/kubernetes.md") if each.language == "yaml"]
    assert len(blocks) == 7
    merged: dict[str, Any] = {}
    for block in blocks:
        assert len(manifests(block)) > 10
        for name, value in block.items():
            merged[name] = {**merged.get(name, {}), **value}
    kinds = {each["kind"] for each in manifests(merged)}
    assert {"StatefulSet", "Deployment", "Job", "ScaledObject", "Certificate", "NetworkPolicy"} <= kinds


def test_the_guide_builds_the_image_that_is_asked_for() -> None:
    guide = (ROOT / "docs" / "guides" / "kubernetes.md").read_text()
    tags = re.findall(r"freestep-service:(\S+)", guide)
    own = container({}, "shards").spec["image"].rpartition(":")[2]
    assert tags and set(tags) == {own}


def test_the_guide_keeps_a_token_as_it_is_sent() -> None:
    (command,) = (
        line
        for block in blocks_of("docs/guides/kubernetes.md")
        for line in block.text.splitlines()
        if "tokens create" in line
    )
    script = re.sub(r"kubectl .* -- freestep", "freestep", command).replace(" >token", "")
    (made,) = (part for part in script.split(" | ") if part.startswith("freestep "))
    printed = "fs_token\n"
    done = subprocess.run(
        script.replace(made, "cat"), shell=True, input=printed, capture_output=True, text=True, timeout=60
    )
    # Neither kubectl nor the Prometheus operator takes a newline off.
    assert (done.returncode, done.stdout) == (0, "fs_token")
