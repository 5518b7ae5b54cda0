"""Files are written whole or not at all, through links; pipes, devices and standard output are written through."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from stat import S_IMODE

import pytest

from forked import Script
from freestep.files import is_stdout, writing
from meanwhile import under_way


def write(path: Path, *pieces: bytes) -> None:
    with writing(path) as file:
        for piece in pieces:
            file.write(piece)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with pytest.raises(KeyError), writing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyError
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    write(path, b"ne", b"w")
    assert path.read_bytes() == b"new"
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "file", b"")
    with pytest.raises(IsADirectoryError):
        write(tmp_path, b"")


def test_of_two_who_write_at_once_the_last_has_written_it(tmp_path: Path) -> None:
    """As containers do that share a directory, whose processes have the same numbers."""
    path = tmp_path / "file"
    with writing(path) as one, writing(path) as other:
        for piece in (b"one", b"two"):
            one.write(piece)
            other.write(piece.upper())
    assert path.read_bytes() == b"onetwo"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_who_may_read_a_file_may_read_what_replaces_it_and_nobody_else(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    path.chmod(mode)
    with writing(path) as file:
        assert {S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {mode}
        file.write(b"new")
    assert (path.read_bytes(), S_IMODE(path.stat().st_mode)) == (b"new", mode)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(tmp_path: Path, is_there: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, between, link = tmp_path / "elsewhere" / "target", tmp_path / "between", tmp_path / "link"
    between.symlink_to("elsewhere/target")
    link.symlink_to("between")
    if is_there:
        target.write_bytes(b"old")
    write(link, b"new")
    assert (target.read_bytes(), target.is_symlink(), os.readlink(link)) == (b"new", False, "between")
    assert [each.name for each in target.parent.iterdir()] == ["target"]


def test_a_pipe_is_written_through(tmp_path: Path) -> None:
    pipe, content = tmp_path / "pipe", os.urandom(1 << 20)
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    reading = under_way(pipe.read_bytes)
    write(tmp_path / "link", content[:7], content[7:])
    assert reading.result() == content
    assert pipe.is_fifo()


def test_a_device_is_written_through() -> None:
    write(Path("/dev/null"), b"new")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space"):
        write(Path("/dev/full"), b"new")


WRITER = """
import sys
from pathlib import Path
from freestep.files import is_stdout, writing

path = Path(sys.argv[1])
with writing(path) as file:
    file.write(b"content")
print(f" {is_stdout(path)}")
"""


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_written_through(name: str) -> None:
    with Script(WRITER, name) as script:
        assert script.read_line() == "content True"


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_standard_output_that_leads_to_a_file_is_written_through(tmp_path: Path, name: str) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        before = os.dup(1)
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        try:
            os.write(1, b"before ")
            write(Path(name), b"content")
            assert is_stdout(log)
            os.write(1, b" after")
        finally:
            os.dup2(before, 1)
            os.close(before)
    assert log.read_bytes() == b"before content after"
    assert not is_stdout(log) and not is_stdout(tmp_path / "none")
