"""Writing back early promises nothing, and may harm nothing either."""

from __future__ import annotations

import os
from pathlib import Path

from freestep_service.storage.write_back import begin_write_back


def test_the_bytes_stay_what_they_are(tmp_path: Path) -> None:
    path, data = tmp_path / "file", os.urandom(3_000_001)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        begin_write_back(file.fileno(), 1_000_001, 2_000_000)
    assert path.read_bytes() == data


def test_what_cannot_be_written_back_is_left_to_the_flush() -> None:
    reader, writer = os.pipe()
    begin_write_back(writer, 0, 1_000_000)
    os.close(reader)
    os.close(writer)
    begin_write_back(writer, 0, 1_000_000)
