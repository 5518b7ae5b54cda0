"""A script for the `schedulefree` package trains the same with its import line changed, at home and on a service."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from forked import Script
from freestep import Client
from harness import ThreadService

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("digits_script.py")
EPOCHS, STEPS = 2, 2 * 63


def printed(script: Path, **environment: str) -> list[tuple[float, int]]:
    """The test loss and the number of right answers of each epoch."""
    with Script(script, "--epochs", str(EPOCHS), **environment) as process:
        lines = list(iter(process.read_line, ""))
        assert process.wait() == 0
    return [(float(loss), int(right)) for loss, right in re.findall(r"epoch \d: (\S+) (\d+)", "\n".join(lines))]


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, int]]:
    """What the package's optimizer does."""
    found = printed(SCRIPT)
    assert len(found) == EPOCHS
    return found


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    script = tmp_path / SCRIPT.name
    text = SCRIPT.read_text()
    assert text.count("\nimport schedulefree\n") == 1
    script.write_text(text.replace("\nimport schedulefree\n", "\nimport freestep as schedulefree\n"))
    return script


def assert_same(found: list[tuple[float, int]], expected: list[tuple[float, int]]) -> None:
    for (loss, right), (package_loss, package_right) in zip(found, expected, strict=True):
        assert loss == pytest.approx(package_loss, rel=1e-3)
        assert abs(right - package_right) <= 3


def test_at_home(changed: Path, expected: list[tuple[float, int]]) -> None:
    assert_same(printed(changed, FREESTEP_URL="local"), expected)


def test_on_a_service(service: ThreadService, name: str, changed: Path, expected: list[tuple[float, int]]) -> None:
    assert_same(printed(changed, FREESTEP_URL=service.url, FREESTEP_RUN=name), expected)
    with Client(service.url) as client:
        run = client.run(name)
        assert run.status().pushes["applied"] == STEPS
        x, step = run.pull("x")
        assert step == STEPS
        assert all(isinstance(each, torch.Tensor) and each.isfinite().all() for each in x.values())
