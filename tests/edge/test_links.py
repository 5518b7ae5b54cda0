"""Symbolic links in the data directory: what they name is not the service's to remove."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from freestep.errors import StorageUnavailable
from freestep_service.storage.media import open_storage
from harness import ThreadService
from plain_calls import Api, slug


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A directory outside of the service's."""
    made = tmp_path / "precious"
    (made / "below").mkdir(parents=True)
    for name in ("thesis.txt", "below/data.json"):
        (made / name).write_text("years of work")
    return made


def is_whole(precious: Path) -> bool:
    return sorted(file.name for file in precious.rglob("*")) == ["below", "data.json", "thesis.txt"]


@pytest.mark.parametrize("place", ["run", "checkpoints", "a checkpoint", "deep below"])
def test_deleting_a_run_does_not_follow_a_link(
    start_service: Callable[..., ThreadService], tmp_path: Path, precious: Path, place: str
) -> None:
    service = start_service()
    api = Api(service.url)
    api.create()
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    folder = tmp_path / "data" / "runs" / api.run
    if place == "run":
        for each in folder.iterdir():
            each.rename(precious / each.name)
        folder.rmdir()
        link = folder
    else:
        parent = next(each for each in folder.rglob("*") if each.is_dir()) if place == "deep below" else folder
        link = parent / {"checkpoints": "extra", "a checkpoint": "e1-s9", "deep below": "link"}[place]
    link.symlink_to(precious)
    before = sorted(precious.rglob("*"))
    answer = api.http.delete(api.path())
    assert (answer.status_code, slug(answer)) == (507, "storage-unavailable")
    assert str(link) in answer.json()["detail"]
    assert sorted(precious.rglob("*")) == before
    assert api.push(api.lease(), 0).json()["decision"] == "applied"
    link.unlink()
    assert api.http.delete(api.path()).status_code == 204
    api.http.close()


@pytest.mark.parametrize("url", [False, True], ids=["directory", "fsspec"])
def test_a_removal_does_not_follow_a_link(tmp_path: Path, precious: Path, url: bool) -> None:
    root = tmp_path / "root"
    storage = open_storage(f"local://{root}" if url else root)
    storage.write("runs/one/file", [b"a"])
    (root / "runs" / "two").symlink_to(precious)
    (root / "runs" / "one" / "link").symlink_to(precious)
    for path in ("runs/two", "runs/two/thesis.txt", "runs/two/below", "runs/one", "runs/one/link/below"):
        for refused in (storage.require_removable, storage.remove):
            with pytest.raises(StorageUnavailable, match="symbolic link"):
                refused(path)
    assert is_whole(precious)
    assert storage.read("runs/one/file") == b"a"
    # A link that names a file is removed itself.
    (root / "runs" / "one" / "link").unlink()
    (root / "runs" / "one" / "copy").symlink_to(precious / "thesis.txt")
    storage.remove("runs/one")
    assert is_whole(precious)
    assert storage.names("runs/one") == []


@pytest.mark.parametrize("url", [False, True], ids=["directory", "fsspec"])
def test_all_runs_may_be_on_another_disk(tmp_path: Path, url: bool) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "runs").symlink_to(tmp_path / "disk")
    storage = open_storage(f"local://{tmp_path / 'root'}" if url else tmp_path / "root")
    storage.write("runs/one/file", [b"a"])
    storage.remove("runs/one")
    assert list((tmp_path / "disk").iterdir()) == []
