"""What the last released version left, and that version and this one as they are installed from wheels."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from freestep_service.domain.layout import LAYOUT
from upgrade.installed import RELEASED, Installed, install

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Left:
    """What services of the last released version left, unpacked anew. told: what their clients had been told."""

    folder: Path
    told: dict[str, Any]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture
def left(tmp_path: Path) -> Left:
    folder = tmp_path / "left"
    with tarfile.open(RELEASED.with_name("left-by-0.1.0.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return Left(folder, json.loads((folder / "expected.json").read_text()))


@pytest.fixture(scope="session")
def released() -> Iterator[Installed]:
    """The last released version."""
    with Installed(install(RELEASED, "released")) as version:
        yield version


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this version."""
    folder = tmp_path_factory.mktemp("present")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def present(built: Path) -> Iterator[Installed]:
    """This version."""
    with Installed(install(built, "present")) as version:
        yield version


@pytest.fixture(scope="session")
def later(built: Path) -> Iterator[Installed]:
    """A version to come, whose processes could not work beside this one's."""

    def edit(folder: Path) -> None:
        layout = folder / "freestep_service" / "domain" / "layout.py"
        before = f"\nLAYOUT = {LAYOUT}\n"
        assert before in layout.read_text()
        layout.write_text(layout.read_text().replace(before, f"\nLAYOUT = {LAYOUT + 1}\n"))

    with Installed(install(built, "later", edit)) as version:
        yield version
