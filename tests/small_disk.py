"""File systems of a size of their own, for what happens at the end of a disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["small_disk"]


@contextmanager
def small_disk(directory: Path, kib: int) -> Iterator[Path]:
    """An empty file system of so many KiB, in a new directory; the test is skipped where none may be mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "freestep-test", str(directory)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
