"""The chart as it is published next."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from chart.rendered import CHART


@pytest.fixture
def next_chart(tmp_path: Path) -> Path:
    """The chart as it is published next: with other versions, and nothing else that is new."""
    folder = tmp_path / "freestep"
    shutil.copytree(CHART, folder)
    file = folder / "Chart.yaml"
    file.write_text(re.sub(r"(?m)^(version|appVersion): .*$", r"\1: 99.0.0", file.read_text()))
    return folder
