"""Where the machine code of compiled loops is kept: apart for each version of the sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from freestep_service import optimizers
from freestep_service.optimizers.kernels.machine_code import cache_directory

PACKAGE = Path(optimizers.__file__).parent


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's caches, in a directory that does not exist yet."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "caches"))
    return tmp_path / "caches"


def test_the_same_sources_have_the_same_directory(caches: Path) -> None:
    directory = cache_directory()
    assert directory is not None
    assert directory.is_dir()
    assert directory.parent == caches
    assert cache_directory() == directory


@pytest.mark.parametrize("changed", ["kernels/sweep.py", "methods/schedule_free.py", "method.py"])
def test_changed_sources_have_another_directory(caches: Path, tmp_path: Path, changed: str) -> None:
    copy = tmp_path / "optimizers"
    shutil.copytree(PACKAGE, copy)
    before = cache_directory(copy)
    assert before == cache_directory()
    (copy / changed).write_text((copy / changed).read_text() + "# A change.\n")
    assert cache_directory(copy) not in (before, None)


def test_no_code_is_kept_where_no_directory_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/dev/null/nowhere")
    assert cache_directory() is None


def test_the_directory_is_among_the_users_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    directory = cache_directory()
    assert directory is not None
    assert directory.parent == tmp_path / "xdg" / "freestep"
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = cache_directory()
    assert directory is not None
    assert directory.parent == tmp_path / "Library" / "Caches" / "freestep"
