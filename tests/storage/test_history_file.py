"""The file of a run's history."""

from __future__ import annotations

import json

import pytest

from freestep_service.domain.events import Event, Place
from freestep_service.domain.history import HistoryCurves
from freestep_service.domain.records import Origin
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.history_file import HistoryFile
from freestep_service.storage.media import Storage

PATH = "histories/run.json"


def history() -> HistoryCurves:
    """One with an observation."""
    made = HistoryCurves()
    made.take(Event("metric", Place(1, 1), 3, {"name": "acc", "value": 0.5, "measured_at": 2}), 1000.0)
    return made


@pytest.fixture
def file(storage: Storage) -> HistoryFile:
    return HistoryFile(storage, "run", Origin(1, "id"))


def test_it_is_read_back(storage: Storage, file: HistoryFile) -> None:
    assert file.read() is None
    file.write(history().to_document())
    read = file.read()
    assert read is not None
    assert json.dumps(read.to_document()) == json.dumps(history().to_document())
    file.remove()
    assert storage.names("histories") == []


def test_that_of_a_deleted_run_of_the_name_is_another_s(storage: Storage, file: HistoryFile) -> None:
    HistoryFile(storage, "run", Origin(1, "other")).write(history().to_document())
    assert file.read() is None
    file.remove()
    assert storage.names("histories") == ["run.json"]


def test_any_bit_that_flips_is_noticed(storage: Storage, file: HistoryFile) -> None:
    file.write(history().to_document())
    text = storage.read(PATH)
    for bit in range(0, 8 * len(text), 3):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        storage.write(PATH, [bytes(flipped)])
        try:
            # A bit of white space may say the same.
            read = file.read()
        except Damaged:
            continue
        assert read is not None and json.dumps(read.to_document()) == json.dumps(history().to_document())


def test_what_is_no_history_is_damaged(storage: Storage, file: HistoryFile) -> None:
    file.write({"curves": 3})
    with pytest.raises(Damaged, match="no history"):
        file.read()
    file.remove()
    assert storage.names("histories") == []
