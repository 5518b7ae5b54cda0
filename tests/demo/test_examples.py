"""The examples, as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import ProcessService

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(start_process: Callable[..., ProcessService], example: Path) -> None:
    environment = {**os.environ, "FREESTEP_URL": start_process().url}
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, env=environment, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout
