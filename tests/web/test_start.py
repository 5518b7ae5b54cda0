"""A start prints the URL once requests are answered; what prevents it is one line; a Ctrl-C before it is silent."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from redis import Redis

import forked
from coordination.servers import valkey_server
from harness import ProcessService, ThreadService
from meanwhile import wait_until
from plain_calls import Api, slug
from ports import free_port

pytestmark = pytest.mark.slow
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def taken() -> Iterator[str]:
    """A port that somebody listens on who never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


@pytest.fixture
def free() -> str:
    """A port that nobody listens on."""
    return str(free_port())


def test_a_redis_that_removes_keys_is_refused(redis_url: str, tmp_path: Path) -> None:
    with Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    done = forked.freestep("serve", "--port", "0", "--redis-url", redis_url, "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "set its maxmemory-policy to noeviction, it is allkeys-lru" in done.stderr


def test_a_variable_that_is_almost_a_setting_is_told(free: str, tmp_path: Path) -> None:
    said = forked.freestep(
        *("serve", "--port", "0", "--data-dir", str(tmp_path), "--redis-url", f"redis://127.0.0.1:{free}/0"),
        FREESTEP_CHECKPOINT_SECOND="5",
        FREESTEP_WORKER="me",
    ).stderr
    assert "FREESTEP_CHECKPOINT_SECOND is no setting and is not used: is FREESTEP_CHECKPOINT_SECONDS meant?" in said
    assert "FREESTEP_WORKER" not in said


@pytest.mark.parametrize(
    ("flags", "exit_code", "complaint"),
    [
        (["--port", "{taken}"], 1, "127.0.0.1:{taken} cannot be listened on, choose another host or port: Address al"),
        (["--host", "192.0.2.1"], 1, "192.0.2.1:0 cannot be listened on, choose another host or port: "),
        (["--host", "2001:db8::1"], 1, "[2001:db8::1]:0 cannot be listened on, choose another host or port: "),
        (
            ["--redis-url", "redis://:secret@127.0.0.1:{free}/0"],
            1,
            "Redis at 127.0.0.1:{free}/0 is needed, start it or name another with redis_url: Error 111 ",
        ),
        (["--data-dir", "{tmp}/file"], 1, "the data directory {tmp}/file cannot be used, name another with data_dir: "),
        (["--ssl-certfile", "{tmp}/none.pem"], 1, "{tmp}/none.pem cannot be read: No such file or directory"),
        (["--ca-certs", "{tmp}/file"], 1, "there are no CA certificates in {tmp}/file, as PEM"),
        (["--ssl-keyfile", "{tmp}/file"], 2, "a key needs its certificate: set ssl_certfile too"),
        (["--redis-url", "http://127.0.0.1:{free}"], 2, "redis_url: "),
        (["--redis-password-file", "{tmp}/file"], 2, "redis_password_file is for a Redis: set redis_url too"),
        (
            ["--redis-url", "redis://:secret@127.0.0.1:{free}", "--redis-password-file", "{tmp}/file"],
            2,
            "redis_password_file and redis_url both have a password: leave it out of redis_url",
        ),
        (
            ["--redis-url", "redis://127.0.0.1:{free}?password=secret", "--redis-password-file", "{tmp}/file"],
            2,
            "redis_password_file and redis_url both have a password: leave it out of redis_url",
        ),
        (
            ["--redis-url", "redis://127.0.0.1:{free}", "--redis-password-file", "{tmp}/none"],
            2,
            "redis_password_file: [Errno 2] No such file or directory: '{tmp}/none'",
        ),
        (["--checkpoint-url", "nowhere://bucket"], 2, "checkpoint_url: "),
        (["--device", "abacus"], 2, "device: 'abacus' is none: cpu, cuda, cuda:N or auto"),
        (["--device", "mps"], 2, "device: 'mps' is none: cpu, cuda, cuda:N or auto"),
        (["--device", "cuda:99"], 2, "device: cuda:99 cannot be used, choose another or cpu: "),
        pytest.param(
            ["--device", "cuda"], 2, "device: cuda cannot be used, choose another or cpu: ", marks=without_gpu
        ),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(
    tmp_path: Path, taken: str, free: str, flags: list[str], exit_code: int, complaint: str
) -> None:
    (tmp_path / "file").touch()
    names = {"tmp": tmp_path, "taken": taken, "free": free}
    data_dir = str(tmp_path / "data")
    done = forked.freestep("serve", "--port", "0", "--data-dir", data_dir, *(flag.format(**names) for flag in flags))
    assert done.stderr.startswith(f"freestep serve: {complaint.format(**names)}")
    assert done.stderr.count("\n") == 1
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert "secret" not in done.stderr
    assert not any(str(tmp_path) in " ".join(each.cmdline()) for each in psutil.Process().children(recursive=True))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 beside IPv4 here")
def test_all_addresses_of_ipv6_are_those_of_ipv4_too(start_process: Callable[..., ProcessService]) -> None:
    service = start_process(host="::", trusted_proxies="127.0.0.1")
    for host in ("127.0.0.1", "[::1]"):
        headers = {"Authorization": "Bearer none", "X-Forwarded-For": "198.51.100.7"}
        assert httpx.get(f"http://{host}:{service.port}/v1/runs", headers=headers).status_code == 401
    service.stop()
    refusals = map(json.loads, (service.data_dir / "refusals.jsonl").read_text().splitlines())
    # Addresses are named as ever, by which the proxy is known.
    assert [each["peer"] for each in refusals] == ["198.51.100.7", "::1"]


@pytest.fixture
def waiting(tmp_path: Path, free: str) -> Iterator[BaseProcess]:
    """A service that has begun to wait for its Redis, at the port that is free."""
    streams = [tmp_path / name for name in ("stdin", "stdout", "stderr")]
    for stream in streams:
        stream.touch()
    flags = ["--port", "0", "--data-dir", str(tmp_path / "data"), "--redis-wait-seconds", "7200"]
    process = forked.start("serve", *flags, "--redis-url", f"redis://127.0.0.1:{free}/0", streams=streams)
    try:
        said = f"waiting for at most 7200 s: Redis at 127.0.0.1:{free}/0 is needed, start it or name another"
        wait_until(lambda: said in streams[2].read_text())
        yield process
    finally:
        process.terminate()
        forked.join(process)


def test_a_redis_that_comes_late_is_waited_for(waiting: BaseProcess, free: str, tmp_path: Path) -> None:
    with valkey_server(tmp_path / "valkey", port=int(free)):
        wait_until(lambda: "freestep listens on http://" in (tmp_path / "stdout").read_text())
        assert (tmp_path / "stderr").read_text().count("waiting for") == 1
        url = (tmp_path / "stdout").read_text().split()[-1]
        assert httpx.get(f"{url}/readyz").status_code == 200


def test_who_waits_for_redis_ends_when_told_to(waiting: BaseProcess, tmp_path: Path) -> None:
    waiting.terminate()
    assert forked.join(waiting) != 0
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert (tmp_path / "stdout").read_text() == ""


def test_a_redis_that_does_not_come_ends_the_start(tmp_path: Path, free: str) -> None:
    flags = ["--port", "0", "--data-dir", str(tmp_path / "data"), "--redis-wait-seconds", "0.1"]
    done = forked.freestep("serve", *flags, "--redis-url", f"redis://127.0.0.1:{free}/0")
    noted, complaint = done.stderr.strip().splitlines()
    assert "waiting for at most 0.1 s" in noted
    assert complaint.startswith(f"freestep serve: Redis at 127.0.0.1:{free}/0 is needed, ")
    assert (done.returncode, done.stdout) == (1, "")


def test_the_url_is_printed_when_requests_are_answered(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "freestep.cli", "serve", "--port", "0", "--data-dir", str(tmp_path / "data")]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("freestep listens on ").strip()
        assert url.startswith("http://127.0.0.1:")
        # Without asking twice.
        assert httpx.get(f"{url}/readyz").status_code == 200
    finally:
        process.terminate()
        assert process.communicate(timeout=60)[0] == ""


@pytest.mark.parametrize("library", ["libtorch_cpu", "llvmlite"])
def test_ctrl_c_during_the_imports_says_nothing(tmp_path: Path, library: str) -> None:
    command = [sys.executable, "-m", "freestep.cli", "serve"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: library in maps.read_text(), pause_s=0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_a_data_directory_that_is_made_is_its_users_alone(
    start_service: Callable[..., ThreadService], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mask = os.umask(0o022)
    try:
        start_service(tmp_path / "new").stop()
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
        # One that is there keeps the mode that its maker chose.
        (tmp_path / "old").mkdir(0o755)
        start_service(tmp_path / "old").stop()
        assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o755
    finally:
        os.umask(mask)
    assert "other users" not in caplog.text


@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o755, 12345)], ids=["everybody's", "another's"])
def test_where_others_may_write_is_said(
    start_service: Callable[..., ThreadService],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: int,
    owner: int,
) -> None:
    place = tmp_path / "planted"
    place.mkdir()
    place.chmod(mode)
    if owner and os.geteuid() != 0:
        pytest.skip("only root gives directories away")
    os.chown(place, owner or -1, -1)
    start_service(place).stop()
    assert f"other users may write in the data directory {place}" in caplog.text


def test_its_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lock").symlink_to(tmp_path / "elsewhere")
    done = forked.freestep("serve", "--port", "0", "--data-dir", str(tmp_path / "data"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"the data directory {tmp_path}/data cannot be used" in done.stderr and "symbolic links" in done.stderr
    assert not (tmp_path / "elsewhere").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of the test's own."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "freestep-test", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("becomes", ["full", "read-only"])
def test_what_a_disk_holds_is_served_when_nothing_can_be_written(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], disk: Path, becomes: str
) -> None:
    service = start_service(disk)
    api = connect(service.url, "kept")
    api.create()
    assert api.push(api.lease(), 0).json()["step"] == 1
    service.stop()
    if becomes == "full":
        with (disk / "ballast").open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 8):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    service = start_service(disk)
    api = connect(service.url, "kept")
    assert api.pull("y")[1] == 1
    refused = connect(service.url, "new").http.put("/v1/runs/new", json=api.spec())
    assert (refused.status_code, slug(refused)) == (507, "storage-unavailable")
    assert api.push(api.lease("again"), 1).json()["step"] == 2
    written = api.http.post(api.path("/checkpoints"))
    assert (written.status_code, slug(written)) == (507, "storage-unavailable")
    assert "kept" in api.http.get("/readyz").json()["problems"]
    service.stop()


def test_an_app_in_anothers_process_leaves_its_garbage_collector_alone(tmp_path: Path) -> None:
    """Only a process that is the service's own may have the collector pass over all that it holds."""
    frozen = gc.get_freeze_count()
    service = ThreadService(tmp_path)
    service.stop()
    assert gc.get_freeze_count() <= frozen
