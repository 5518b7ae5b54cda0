"""The embedded store starts for a data directory of any name."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from freestep_service.coordination.embedded import embedded_store
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import Api

NAMES = [
    "plain",
    "a space",
    "it's",
    'in "quotes"',
    "#hash",
    "a#hash",
    "per%41cent",
    "a?question=mark&more",
    "back\\slash",
    "übergröße",
    "new\nline",
    "tab\t",
    "a::b",
    os.fsdecode(b"not utf-8 \xff"),
    "long" * 50,
]


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_at_its_url(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        with embedded_store(tmp_path / name) as url, Redis.from_url(url) as client:
            assert client.ping()
            assert Path(os.fsdecode(client.config_get("dir")["dir"])).is_dir()


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "of an older version"])
def test_its_files_are_its_users_alone(tmp_path: Path, is_old: bool) -> None:
    folder = tmp_path / "valkey"
    if is_old:
        folder.mkdir(mode=0o755)
    with embedded_store(tmp_path):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.fixture(params=["plain-", "a space-"])
def temporary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Another folder for temporary files, whose path is short."""
    with tempfile.TemporaryDirectory(prefix=request.param, dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_the_folder_for_temporary_files_may_have_such_a_name(tmp_path: Path, temporary: Path) -> None:
    with embedded_store(tmp_path / "a b") as url, Redis.from_url(url) as client:
        assert client.ping()
        used = Path(client.config_get("dir")["dir"])
        assert used.parent == (Path("/tmp") if " " in str(temporary) else temporary)
        assert used.stat().st_mode & 0o777 == 0o700
    assert not used.exists()


def test_another_users_folder_is_not_used(tmp_path: Path, temporary: Path) -> None:
    """A link may lead anywhere."""
    with embedded_store(tmp_path / "a b") as url, Redis.from_url(url) as client:
        used = Path(client.config_get("dir")["dir"])
    used.symlink_to(tmp_path)
    try:
        with pytest.raises(PermissionError, match="no directory of this user"), embedded_store(tmp_path / "a b"):
            pass
    finally:
        used.unlink()
    assert not list(tmp_path.glob("valkey*"))


def process_of(client: Redis) -> int:
    return int(client.info("server")["process_id"])


def kill_and_await_another(client: Redis) -> None:
    killed = process_of(client)
    os.kill(killed, signal.SIGKILL)

    def is_another() -> bool:
        try:
            return process_of(client) != killed
        except RedisConnectionError:
            return False

    wait_until(is_another)


def test_it_is_started_again_whenever_it_ends(tmp_path: Path) -> None:
    with embedded_store(tmp_path) as url, Redis.from_url(url) as client:
        for _ in range(2):
            kill_and_await_another(client)
        last = process_of(client)
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_it_can_be_ended_where_it_cannot_be_started_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with embedded_store(tmp_path) as url, Redis.from_url(url) as client:
        process = process_of(client)
        # Nobody can create a socket where a folder is.
        file = tmp_path / "valkey" / "valkey.sock"
        file.unlink()
        file.mkdir()
        os.kill(process, signal.SIGKILL)
        wait_until(lambda: "cannot be started" in caplog.text)


def test_a_run_goes_on_when_its_store_was_killed(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service()
    api = connect(service.url)
    api.create()
    lease = api.lease()
    api.push(lease, 0, "first")
    epoch = api.status()["epoch"]
    with service.redis() as client:
        kill_and_await_another(client)
    assert api.push(lease, 0, "first").json()["replayed"] is True
    assert api.push(api.lease(), 1, "second").json()["step"] == 2
    assert api.status()["epoch"] == epoch


def test_a_service_works_in_a_directory_of_any_name(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    data_dir = tmp_path / 'it\'s a "new" #1::run'
    service = start_service(data_dir)
    api = connect(service.url)
    api.create()
    api.push(api.lease(), 0)
    service.stop()
    api = connect(start_service(data_dir).url, api.run)
    assert (api.status()["step"], api.status()["epoch"]) == (1, 1)
    assert list(data_dir.glob("runs/*/checkpoints/*"))
