"""The medium of checkpoints: files are whole or not there, and failures are OSErrors."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from forked import Script
from freestep_service.storage.media import FsspecStorage, LocalStorage, Storage, open_storage
from meanwhile import DEADLINE_S, at_once, end


def test_a_path_and_a_file_url_are_directories(tmp_path: Path) -> None:
    for place in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        storage = open_storage(place)
        assert isinstance(storage, LocalStorage)
        assert str(storage) == str(tmp_path)
    assert isinstance(open_storage("memory://somewhere"), FsspecStorage)


@pytest.mark.parametrize("place", ["nothing://like/that", "simplecache::nothing://like/that"])
def test_a_protocol_that_nothing_speaks_is_refused_at_once(place: str) -> None:
    with pytest.raises(ValueError, match="nothing"):
        open_storage(place)


def test_what_is_written_is_read_back(storage: Storage) -> None:
    content = bytes(range(256)) * 1000
    storage.write("a/b/file", [content[:10], memoryview(content)[10:], b""])
    assert storage.read("a/b/file") == content
    with storage.open("a/b/file") as file:
        assert file.read(5) == content[:5]
        assert file.read() == content[5:]
        assert file.read(1) == b""


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    storage.write("empty", [])
    assert storage.read("empty") == b""
    assert storage.names("") == ["empty"]
    with storage.open("empty") as file:
        assert file.read() == b""


def test_a_file_larger_than_a_block_is_read_through(storage: Storage) -> None:
    block = bytes(1024) + b"x" * 1024
    storage.write("large", [block] * 20_000)
    with storage.open("large") as file:
        buffer = bytearray(1_000_000)
        read = 0
        while size := file.readinto(buffer):
            assert buffer[:size] == (block * 500)[read % 2048 : read % 2048 + size]
            read += size
    assert read == 20_000 * 2048


def test_a_file_can_be_replaced(storage: Storage) -> None:
    storage.write("file", [b"a longer first"])
    storage.write("file", [b"second"])
    assert storage.read("file") == b"second"
    assert storage.names("") == ["file"]


def test_what_is_not_there(storage: Storage) -> None:
    for path in ("none", "none/deeper"):
        with pytest.raises(FileNotFoundError):
            storage.read(path)
        with pytest.raises(FileNotFoundError), storage.open(path) as file:
            file.read()
        assert storage.names(path) == []
        storage.remove(path)


def test_names_are_those_directly_inside(storage: Storage) -> None:
    for path in ("d/b", "d/a", "d/c/deep/er", "dd/e", "d/.hidden"):
        storage.write(path, [b"x"])
    assert storage.names("d") == ["a", "b", "c"]
    assert storage.names("") == ["d", "dd"]


def test_a_file_and_a_tree_can_be_removed(storage: Storage) -> None:
    for path in ("d/a", "d/b", "d/c/deep", "dd/e"):
        storage.write(path, [b"x"])
    storage.remove("d/a")
    assert storage.names("d") == ["b", "c"]
    storage.remove("d")
    assert storage.names("d") == []
    assert storage.names("") == ["dd"]
    storage.write("d/a", [b"again"])
    assert storage.read("d/a") == b"again"


@pytest.mark.parametrize("before", [None, b"whole"])
def test_a_write_that_fails_leaves_what_was_there(storage: Storage, before: bytes | None) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise OSError("no more")

    if before is not None:
        storage.write("file", [before])
    with pytest.raises(OSError, match="no more"):
        storage.write("file", pieces())
    assert storage.names("") == ([] if before is None else ["file"])
    if before is not None:
        assert storage.read("file") == before
    storage.write("file", [b"after"])
    assert storage.read("file") == b"after"


def test_nothing_hidden_is_left_by_a_write_that_fails(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        LocalStorage(tmp_path).write("file", [b"half", "text"])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_directory_should_be_is_an_oserror(storage: Storage) -> None:
    storage.write("file", [b"x"])
    with pytest.raises(OSError, match="file"):
        storage.write("file/inside", [b"x"])
    assert storage.read("file") == b"x"


def test_threads_have_their_writes_to_themselves(storage: Storage) -> None:
    """A failed write neither undoes nor publishes those of other threads."""
    barrier = threading.Barrier(8, timeout=DEADLINE_S)
    failed: list[int] = []

    def pieces(index: int) -> Iterator[bytes]:
        yield b"first half, "
        barrier.wait()
        if index % 2:
            raise OSError("no more")
        yield b"second half"

    def work(index: int) -> None:
        try:
            storage.write(f"file-{index}", pieces(index))
        except OSError:
            failed.append(index)

    at_once(*(partial(work, index) for index in range(8)))
    assert sorted(failed) == [1, 3, 5, 7]
    assert storage.names("") == ["file-0", "file-2", "file-4", "file-6"]
    assert {storage.read(name) for name in storage.names("")} == {b"first half, second half"}


def test_threads_read_the_same_file_at_the_same_time(storage: Storage) -> None:
    content = bytes(range(256)) * 4096
    storage.write("file", [content])
    with storage.open("file") as first, storage.open("file") as second:
        assert first.read(100) == second.read(100) == content[:100]
        assert first.read() == second.read() == content[100:]


@pytest.mark.parametrize("storage", ["directory", "fsspec-directory"], indirect=True)
def test_threads_remove_the_same_tree_at_the_same_time(storage: Storage) -> None:
    for number in range(100):
        storage.write(f"tree/{number % 10}/{number}", [b"x"])
    at_once(*[partial(storage.remove, "tree")] * 4)
    assert storage.names("") == []


def test_what_a_backend_raises_is_an_oserror() -> None:
    """A server that hangs up makes ftplib raise EOFError."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        storage = open_storage(f"ftp://127.0.0.1:{listener.getsockname()[1]}/place")
        calls: list[Callable[[], object]] = [
            lambda: storage.write("file", [b"x"]),
            lambda: storage.read("file"),
            lambda: storage.open("file"),
            lambda: storage.names(""),
            lambda: storage.remove("file"),
        ]

        def hang_up() -> None:
            for _ in calls:
                listener.accept()[0].close()

        server = threading.Thread(target=hang_up)
        server.start()
        for call in calls:
            with pytest.raises(OSError, match="EOFError"):
                call()
        end(server)


WRITER = """
import sys
from freestep_service.storage.media import open_storage

def pieces():
    yield b"half"
    print("ready", flush=True)
    sys.stdin.readline()

open_storage(sys.argv[1]).write("directory/file", pieces())
"""


def test_killed_in_the_middle_of_a_write_it_leaves_what_was_there(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for before in (None, b"whole"):
        if before is not None:
            storage.write("directory/file", [before])
        with Script(WRITER, str(tmp_path)) as writer:
            assert writer.read_line() == "ready"
            writer.kill()
        assert storage.names("directory") == ([] if before is None else ["file"])
    assert storage.read("directory/file") == b"whole"
    storage.remove("directory")
    assert list(tmp_path.iterdir()) == []
