"""Journals on a real disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.journals import Writing


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[Writing]:
    made = Writing(tmp_path / "run" / "000000000000000-000000000000008")
    yield made
    made.journal.close()
