"""What the Makefile's targets leave behind."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = {"freestep-data", "*.egg-info"}
"""A service's data, and what no target makes."""


def test_clean_removes_what_targets_make() -> None:
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    command = ["make", "--dry-run", "--no-print-directory", "clean"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert ignored - set(shlex.split(printed)) == KEPT
