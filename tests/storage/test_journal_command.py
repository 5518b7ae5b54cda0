"""`freestep journal`, on journals in a directory as a service leaves them."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue

import pytest

from freestep_service.domain.records import CheckpointId, Record
from freestep_service.storage.checksummed import Damaged
from freestep_service.storage.journal_files import Ownership, chain, frames
from freestep_service.storage.journal_format import Frame, Kind, encode_frame
from freestep_service.storage.journal_reader import read_journal
from freestep_service.storage.journal_repair import Examination, examine, look
from storage.journals import Writing, frame_places, journal_command

ELEMENTS = "000000000000000-000000000000008"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The journal of a run's one shard, with four entries."""
    writing = Writing(tmp_path / "journal" / "run" / ELEMENTS)
    writing.begin(1, CheckpointId(1, 0, 0), 0)
    for seq in range(1, 5):
        key = f"key-{seq}"
        writing.push(key, bytes([seq]) * 100)
        record = Record("lease 1", {}, "applied", seq, 0, seq, 1, "worker", 1)
        writing.entry(seq, key, step=seq, advance=True, record=record.to_json())
    writing.journal.close()
    return writing.journal.directory


def damage(directory: Path, seq: int) -> None:
    """Breaks an entry that was on disk when later ones were written."""
    path = chain(directory)[-1][1]
    entry = frame_places(path, Kind.ENTRY)[seq - 1]
    data = bytearray(path.read_bytes())
    data[entry.at + 45] ^= 1
    path.write_bytes(data)


def test_a_sound_journal_is_verified_and_shown(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert journal_command(tmp_path, "verify") == 0
    assert f"elements {ELEMENTS}" in (line := capsys.readouterr().out)
    assert line.startswith("sound, ") and "entries 1-4" in line
    assert journal_command(tmp_path, "show", "run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)[ELEMENTS]
    assert [row["kind"] for row in shown] == ["begin", *["part", "entry"] * 4]
    assert [row["seq"] for row in shown if row["kind"] == "entry"] == [1, 2, 3, 4]
    assert journal_command(tmp_path, "show", "run", "--shard", "0", "--last", "1") == 0
    assert "applied" in (table := capsys.readouterr().out)
    assert len(table.splitlines()) == 3
    assert journal_command(tmp_path, "repair", "run") == 1
    assert "nothing to repair" in capsys.readouterr().err
    assert journal_command(tmp_path, "show", "other") == 1
    assert "no journal of run other" in capsys.readouterr().err
    assert journal_command(tmp_path, "show", "\x1b[31m\n") == 1
    assert r"no journal of run \x1b[31m\n in" in capsys.readouterr().err


def test_room_behind_a_journal_is_told_from_what_is_no_frame(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = chain(directory)[-1][1].stat().st_size - read_journal(directory).segments[-1].size
    assert journal_command(tmp_path, "verify") == 0
    assert f", {room} bytes of room allocated in advance" in (line := capsys.readouterr().out)
    assert "behind its end" not in line
    with chain(directory)[-1][1].open("ab") as file:
        file.write(b"torn")
    assert journal_command(tmp_path, "verify") == 0
    assert f", {room + 4} bytes behind its end that are no whole frame" in (line := capsys.readouterr().out)
    assert "allocated" not in line
    assert journal_command(tmp_path, "verify", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["torn"], found["allocated"]) == (room + 4, 0)


def test_a_damaged_journal_is_repaired(tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(directory, 3)
    assert journal_command(tmp_path, "verify", "run") == 1
    assert "is damaged" in (line := capsys.readouterr().out)
    assert "`freestep journal repair run`" in line and "sound" not in line
    assert journal_command(tmp_path, "repair", "run") == 0
    told = capsys.readouterr().out
    assert "kept entries 1 to 2; lost what is behind them; set aside: " in told
    assert "run: it goes on at the newest entry that all its shards have, in a new epoch" in told
    assert read_journal(directory).repaired == 1
    assert [entry.seq for entry in read_journal(directory).entries] == [1, 2]
    assert len(list(directory.glob("*.damaged"))) == 1
    assert journal_command(tmp_path, "verify", "run") == 0


def test_a_journal_is_given_up(tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert journal_command(tmp_path, "repair", "run", "--discard") == 0
    assert "kept no entries; lost entries 1 to 4" in capsys.readouterr().out
    contents = read_journal(directory)
    assert (contents.epoch, contents.repaired) == (0, 1)
    assert journal_command(tmp_path, "repair", "run", "--discard") == 1


def test_a_damaged_journal_is_shown_up_to_its_damage_and_that_is_said(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Beside a journal that is sound, as another shard's may be.
    shutil.copytree(directory, directory.with_name("000000000000008-000000000000016"))
    damage(directory, 3)
    for options in ([], ["--json"], ["--last", "2"], ["--limit", "1"], ["--shard", "0"]):
        assert journal_command(tmp_path, "show", "run", *options) == 1
        shown = capsys.readouterr()
        assert shown.err.startswith(
            f"freestep journal: run {ELEMENTS} is shown up to its damage: the journal is damaged"
        )
        assert "key-4" not in shown.out.partition("000000000000008-000000000000016")[0]
    assert journal_command(tmp_path, "show", "run", "--json") == 1
    first, second = json.loads(capsys.readouterr().out).values()
    assert [row["seq"] for row in first if row["kind"] == "entry"] == [1, 2]
    assert [row["seq"] for row in second if row["kind"] == "entry"] == [1, 2, 3, 4]
    assert journal_command(tmp_path, "show", "run", "--shard", "1") == 0
    assert journal_command(tmp_path, "verify", "run") == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["damage" in line for line in lines[-2:]] == [True, False]


def test_a_file_of_owners_that_is_damaged_or_absent_hides_no_entries(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = directory / "owner"
    whole = owner.read_text()
    for broken in ("", "0123456789abcdef\n", whole.replace(whole[0], "g"), "\udcff"):
        owner.write_text(broken, errors="surrogateescape")
        assert journal_command(tmp_path, "verify", "run") == 1
        assert "says whose segments count, is damaged" in capsys.readouterr().out
        assert journal_command(tmp_path, "show", "run") == 1
        capsys.readouterr()
    assert journal_command(tmp_path, "repair", "run") == 0
    assert "kept entries 1 to 4; lost nothing; set aside: owner.damaged" in capsys.readouterr().out
    assert [entry.seq for entry in read_journal(directory).entries] == [1, 2, 3, 4]
    owner.unlink()
    # A copy: whoever takes it over finds them, too.
    Ownership(directory)
    assert [entry.seq for entry in read_journal(directory).entries] == [1, 2, 3, 4]


def test_what_one_journal_refuses_is_said_beside_what_is_done_to_others(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = directory.with_name("000000000000008-000000000000016")
    shutil.copytree(directory, other)
    damage(directory, 3)
    (path,) = other.glob("*.journal")
    begin = next(frames(path))
    assert isinstance(begin, Frame)
    path.write_bytes(encode_frame(Kind.BEGIN, {**begin.head, "format": 2}, 0, 0, 0))
    assert journal_command(tmp_path, "repair", "run") == 1
    shown = capsys.readouterr()
    assert f"run {ELEMENTS}: kept entries 1 to 2" in shown.out
    assert f"{path} is of format 2" in shown.err


def test_a_newer_journal_is_not_given_up_and_those_behind_it_are(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = directory.with_name("000000000000008-000000000000016")
    shutil.copytree(directory, other)
    (path,) = directory.glob("*.journal")
    path.write_bytes(encode_frame(Kind.BEGIN, {"format": 2}, 0, 0, 0))
    before = {each.name: each.read_bytes() for each in directory.iterdir()}
    assert journal_command(tmp_path, "repair", "run", "--discard") == 1
    shown = capsys.readouterr()
    assert f"run {other.name}: kept no entries; lost entries 1 to 4" in shown.out
    assert "run: it goes on from the newest checkpoint that all its shards have, in a new epoch" in shown.out
    assert shown.err == (
        f"freestep journal: run {ELEMENTS}: {path} is of format 2, and this version of freestep knows format 1: "
        "start the version that wrote it\n"
    )
    assert {each.name: each.read_bytes() for each in directory.iterdir()} == before
    assert journal_command(tmp_path, "verify", "run") == 1
    assert f"damage {path} is of format 2" in capsys.readouterr().out
    assert journal_command(tmp_path, "show", "run") == 1
    assert f"{path} is of format 2" in capsys.readouterr().err


def test_a_note_of_a_repair_that_is_damaged_is_made_anew(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "repaired").write_text("x")
    assert journal_command(tmp_path, "verify", "run") == 1
    assert "which says what a repair has given up, is damaged" in capsys.readouterr().out
    assert journal_command(tmp_path, "repair", "run") == 0
    contents = read_journal(directory)
    assert ([entry.seq for entry in contents.entries], contents.repaired) == ([1, 2, 3, 4], 1)


def test_journals_that_cannot_be_found_do_not_pass_for_sound(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journals = directory.parent.parent
    for elsewhere in (tmp_path / "elsewhere", directory / "owner"):
        for arguments in (["verify"], ["verify", "run"], ["show", "run"], ["repair", "run"]):
            assert journal_command(tmp_path, *arguments, "--journal-dir", str(elsewhere)) == 1
            assert f"the journals in {elsewhere} cannot be read" in capsys.readouterr().err
    (journals / "lost+found").mkdir()
    (journals / "other").symlink_to(directory)
    shutil.copytree(directory, directory.with_name(f"{ELEMENTS}.copy"))
    assert journal_command(tmp_path, "verify") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    assert journal_command(tmp_path, "verify", "--journal-dir", str(tmp_path / "empty")) == 0
    assert "there are no journals in" in capsys.readouterr().err


def test_what_another_look_does_not_find_is_no_damage_of_a_journal_that_is_written() -> None:
    found = iter([FileNotFoundError("a"), Damaged("b"), Damaged("c"), None, Damaged("d")])

    def read() -> Exception | None:
        error = next(found)
        if isinstance(error, OSError):
            raise error
        return error

    assert look(read, lambda error: error) is None
    found = iter([Damaged("a"), FileNotFoundError("b"), FileNotFoundError("b"), None])
    with pytest.raises(FileNotFoundError):
        look(read, lambda error: error)
    assert list(found) == [None]
    found = iter([Damaged("a"), Damaged("a"), None])
    assert str(look(read, lambda error: error)) == "a"


def test_a_journal_is_examined_beside_its_writer(tmp_path: Path) -> None:
    writing = Writing(tmp_path / ELEMENTS)
    journal = writing.journal
    # A writer that cuts in every look has none come to an end, however few looks one process has meanwhile.
    turns: Queue[bool] = Queue(maxsize=4)
    found: list[Examination] = []

    def examine_often() -> None:
        try:
            for _ in range(100):
                with suppress(Full):
                    while True:
                        turns.put_nowait(True)
                found.append(examine(journal.directory))
        finally:
            turns.put(False)

    writing.begin(1, CheckpointId(1, 0, 0), 0)
    thread = threading.Thread(target=examine_often)
    thread.start()
    seq = 0
    while turns.get():
        for _ in range(3):
            seq += 1
            journal.entry({"epoch": 1, "seq": seq}, lambda error: None)
        journal.next_segment()
        writing.flush()
        journal.cut(CheckpointId(1, seq, seq))
    thread.join()
    journal.close()
    assert [each.damage for each in found] == [None] * 100
