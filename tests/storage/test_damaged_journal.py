"""Journals with bytes flipped, cut out or put in: what is read was written, and what is lost is not passed over."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from freestep_service.storage.checksummed import Damaged, NewerFormat
from freestep_service.storage.journal_files import DamagedJournal, Ownership, require_known, segment_path
from freestep_service.storage.journal_format import FORMAT, Kind, encode_frame
from freestep_service.storage.journal_reader import read_journal
from freestep_service.storage.journal_repair import discard, repair
from freestep_service.storage.segment_bytes import SegmentBytes

SALT = 7
WORD = "0123456789abcdef"
CLAIM = {"lease": "lease", "token": 1, "step": 0, "samples": None, "loss": None, "speed": None, "units": {}}
BEGIN = {"format": FORMAT, "salt": SALT, "run": "run", "id": "id", "segment": 1, "previous": None, "epoch": 1}


def written(**begin: Any) -> bytes:
    """A segment of four pushes, of which each was on disk before the next one came."""
    data = encode_frame(Kind.BEGIN, {**BEGIN, "base": [1, 0, 0], **begin}, 0, 0, 0)
    for seq in range(1, 5):
        body = bytes([seq]) * 60
        part = {"claim": {**CLAIM, "key": f"key-{seq}"}, "digest": xxhash.xxh3_128_hexdigest(body)}
        durable = len(data)
        data += encode_frame(Kind.PART, part, len(body), durable, SALT) + body
        data += encode_frame(
            Kind.ENTRY, {"epoch": 1, "seq": seq, "key": f"key-{seq}", "counts": True}, 0, durable, SALT
        )
    return data


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp())
    yield made
    shutil.rmtree(made)


WHOLE = written()
places = st.integers(0, len(WHOLE) - 1)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("flip"), places, st.integers(0, 7)),
            st.tuples(st.just("cut"), places, st.integers(1, 400)),
            st.tuples(st.just("splice"), places, places),
            st.tuples(st.just("end"), places, st.just(0)),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_read_was_written(directory: Path, changes: list[tuple[str, int, int]]) -> None:
    data = bytearray(WHOLE)
    for kind, at, value in changes:
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << value
        elif kind == "cut":
            del data[at : at + value]
        elif kind == "splice":
            data[at:at] = WHOLE[value : value + 300]
        elif kind == "end":
            del data[at:]
    segment_path(directory, 1, WORD).write_bytes(data)
    try:
        contents = read_journal(directory)
    except Damaged:
        return
    assert [entry.seq for entry in contents.entries] == list(range(1, len(contents.entries) + 1))
    for entry in contents.entries:
        assert entry.members == {"epoch": 1, "seq": entry.seq, "key": f"key-{entry.seq}", "counts": True}
        assert entry.part is not None
        try:
            body = b"".join(entry.part.read())
        except DamagedJournal as error:
            assert "freestep journal repair" in str(error)
            continue
        assert body == bytes([entry.seq]) * 60


def test_a_flip_in_its_first_frame_does_not_empty_it(tmp_path: Path) -> None:
    for at in range(encode_frame(Kind.BEGIN, {**BEGIN, "base": [1, 0, 0]}, 0, 0, 0).__len__()):
        data = bytearray(WHOLE)
        data[at] ^= 1
        segment_path(tmp_path, 1, WORD).write_bytes(data)
        with pytest.raises(DamagedJournal) as caught:
            read_journal(tmp_path)
        assert caught.value.at == 0


def test_a_push_that_is_gone_from_the_middle_is_damage(tmp_path: Path) -> None:
    part = WHOLE.index(b"fsj1", 1)
    entry = WHOLE.index(b"fsj1", part + 1)
    segment_path(tmp_path, 1, WORD).write_bytes(WHOLE[:part] + WHOLE[entry:])
    with pytest.raises(DamagedJournal, match="is damaged at byte"):
        read_journal(tmp_path)


def test_frames_that_are_gone_from_the_middle_are_damage(tmp_path: Path) -> None:
    """Whichever they are: what is left are whole frames."""
    begins = [at for at in range(1, len(WHOLE)) if WHOLE.startswith(b"fsj1", at)]
    for first, begin in enumerate(begins[:-1]):
        # What was on disk to there is noted by the push behind it.
        for end in begins[first + 1 : -1]:
            # The last push, and as it is without its decision.
            for size in (len(WHOLE), begins[-1]):
                segment_path(tmp_path, 1, WORD).write_bytes(WHOLE[:begin] + WHOLE[end:size])
                with pytest.raises(DamagedJournal):
                    read_journal(tmp_path)


def test_what_is_behind_damage_is_read_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = encode_frame(Kind.BEGIN, {**BEGIN, "base": [1, 0, 0]}, 0, 0, 0)
    data = begin + b"damage"
    for _ in range(40_000):
        data += encode_frame(Kind.BACK, {"epoch": 2, "seq": 0}, 0, len(begin), SALT)
    path = segment_path(tmp_path, 1, WORD)
    path.write_bytes(data)
    read, sizes = os.pread, list[int]()

    def counted(descriptor: int, length: int, at: int) -> bytes:
        found = read(descriptor, length, at)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(os, "pread", counted)
    read_journal(tmp_path)
    assert sum(sizes) < 20 * len(data)


@pytest.mark.parametrize("gap", range(5))
def test_a_pattern_is_found_across_what_is_read_at_once(tmp_path: Path, gap: int) -> None:
    path, at = tmp_path / "bytes", 1024**2 - gap
    path.write_bytes(bytes(at) + b"fsj1" + bytes(1024**2) + b"fsj1")
    with SegmentBytes(path) as content:
        assert content.find(b"fsj1", 0) == at
        assert content.find(b"fsj1", at + 1) == at + 4 + 1024**2
        assert content.find(b"fsj1", at + 5 + 1024**2) == -1


@pytest.mark.parametrize("act", [require_known, Ownership, read_journal, repair, discard])
@pytest.mark.parametrize("head", [{"format": FORMAT + 1}, {**BEGIN, "format": FORMAT + 1, "salt": "x", "previous": 5}])
def test_of_a_newer_segment_nothing_but_its_format_is_read(
    tmp_path: Path, head: dict[str, Any], act: Callable[[Path], object]
) -> None:
    path = segment_path(tmp_path, 1, WORD)
    path.write_bytes(before := encode_frame(Kind.BEGIN, head, 0, 0, 0) + b"of another form")
    with pytest.raises(NewerFormat, match=f"{path} is of format 2, and this version of freestep knows format 1: start"):
        act(tmp_path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {path.name: before}


@pytest.mark.parametrize("name", ["no format", "a text", "a bool", "an older one", "no object", "no JSON"])
def test_a_segment_without_a_format_that_is_known_is_damaged(tmp_path: Path, name: str) -> None:
    begin: Any = {
        "no format": {"salt": SALT, "previous": None},
        "a text": {**BEGIN, "format": "2"},
        "a bool": {**BEGIN, "format": True},
        "an older one": {**BEGIN, "format": 0},
    }.get(name, [])
    frame = bytearray(encode_frame(Kind.BEGIN, begin, 0, 0, 0))
    if name == "no JSON":
        frame[40:] = b"[]"[::-1]
        frame[32:40] = xxhash.xxh3_64(bytes(frame[:32] + frame[40:])).intdigest().to_bytes(8, "little")
    path = segment_path(tmp_path, 1, WORD)
    # Behind it is a frame that says that its beginning was on disk.
    path.write_bytes(frame + encode_frame(Kind.BACK, {}, 0, len(frame), SALT))
    require_known(tmp_path)
    with pytest.raises(DamagedJournal):
        read_journal(tmp_path)
    done = repair(tmp_path)
    assert done is not None and [each.name for each in done.aside] == [f"{path.name}.damaged"]
    assert read_journal(tmp_path).epoch == 0


def test_a_frame_of_a_kind_that_a_newer_version_has_is_refused(tmp_path: Path) -> None:
    frame = bytearray(encode_frame(Kind.BACK, {}, 0, 0, SALT))
    frame[4] = 77
    frame[32:40] = xxhash.xxh3_64(bytes(frame[:32]) + b"{}", seed=SALT).intdigest().to_bytes(8, "little")
    segment_path(tmp_path, 1, WORD).write_bytes(WHOLE + frame)
    with pytest.raises(NewerFormat, match="has a frame of kind 77 at byte"):
        read_journal(tmp_path)


def test_a_sender_cannot_make_a_torn_tail_look_damaged(tmp_path: Path) -> None:
    false = encode_frame(Kind.BEGIN, {"salt": 1}, 0, 10**9, 0)
    segment_path(tmp_path, 1, WORD).write_bytes(WHOLE + b"torn" + false)
    contents = read_journal(tmp_path)
    assert [entry.seq for entry in contents.entries] == [1, 2, 3, 4]
    assert contents.torn == 4 + len(false)


def test_other_names_are_no_segments_and_links_are_refused(tmp_path: Path) -> None:
    segment_path(tmp_path, 1, WORD).write_bytes(WHOLE)
    for name in ("1.journal", "x.journal", "\u0663.journal", "0000000002.journal.damaged", ".0000000002.journal"):
        (tmp_path / name).write_bytes(b"x")
    assert len(read_journal(tmp_path).entries) == 4
    segment_path(tmp_path, 2, WORD).symlink_to(tmp_path / "x.journal")
    with pytest.raises(DamagedJournal, match="no file of its own"):
        read_journal(tmp_path)
