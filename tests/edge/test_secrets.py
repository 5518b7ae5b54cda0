"""Neither errors nor logs show a password or a token, however it is given and whatever is wrong with it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import forked
from freestep import Client
from freestep.errors import FreestepError
from freestep_service.settings import shown
from harness import AUTHORIZED, TOKEN, ThreadService
from plain_calls import Api

PLANTED = "hunter2"
"""What may be seen nowhere."""


@pytest.mark.parametrize(
    "flags",
    [
        ["--redis-url", f"redis://:{PLANTED}@127.0.0.1:1/0"],
        ["--redis-url", f"redis://127.0.0.1:1/0?password={PLANTED}"],
        ["--redis-url", f"redis://user:{PLANTED}/more@127.0.0.1:1/0"],
        ["--redis-url", f"redis://user:{PLANTED}#more@127.0.0.1:1/0"],
        ["--redis-url", f"redis://user:{PLANTED}?more@127.0.0.1:1/0"],
        ["--redis-url", f"http://:{PLANTED}@127.0.0.1:1"],
        ["--redis-url", f"unix:///nowhere?password={PLANTED}"],
        ["--redis-url", f"redis://127.0.0.1:1/?password={PLANTED}&db=x"],
        ["--checkpoint-url", f"nowhere://key:{PLANTED}@bucket"],
        ["--checkpoint-url", f"ftp://user:{PLANTED}@127.0.0.1:1/folder"],
        ["--checkpoint-url", f"http://user:{PLANTED}@127.0.0.1:1/folder?secret={PLANTED}"],
        ["--advertise-url", f"ftp://user:{PLANTED}@host"],
        ["--advertise-url", f"http://user:{PLANTED}@host?x"],
        ["--ssl-keyfile-password", PLANTED],
    ],
    ids=" ".join,
)
def test_a_service_that_does_not_start_shows_none(tmp_path: Path, flags: list[str]) -> None:
    done = forked.freestep("serve", "--port", "0", "--data-dir", str(tmp_path / "data"), *flags)
    assert done.returncode in (1, 2)
    assert done.stderr
    assert PLANTED not in done.stdout + done.stderr


@pytest.mark.parametrize("place", ["url", "query"])
def test_a_store_with_another_password_shows_none(tmp_path: Path, valkey_url: str, place: str) -> None:
    # Valkey takes any password of its default user.
    query = f"{valkey_url}?username=nobody&password={PLANTED}"
    url = query if place == "query" else valkey_url.replace("://", f"://nobody:{PLANTED}@")
    done = forked.freestep("serve", "--port", "0", "--data-dir", str(tmp_path / "data"), "--redis-url", url)
    assert "name another with redis_url" in done.stderr
    assert PLANTED not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "token", [f"{PLANTED}\n", f"\n{PLANTED}", f"{PLANTED}\r\nX: y", f"{PLANTED}\0", f"{PLANTED} ", f"ü{PLANTED}"]
)
@pytest.mark.parametrize("way", ["token", "environment", "http"])
def test_a_token_that_is_none_is_not_shown(
    service: ThreadService, monkeypatch: pytest.MonkeyPatch, token: str, way: str
) -> None:
    with pytest.raises((FreestepError, ValueError)) as refused:
        if way == "environment":
            if "\0" in token:
                raise ValueError("the environment takes none")
            monkeypatch.setenv("FREESTEP_TOKEN", token)
            Client(service.url)
        elif way == "token":
            Client(service.url, token=token)
        else:
            headers = {"Authorization": b"Bearer " + token.encode("latin-1") + b"\n"}
            with Client(http=httpx.Client(base_url=service.url, headers=headers), retry_for=0) as client:
                client.runs()
    assert PLANTED not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("url", ["http://me:{}@127.0.0.1:1", "ftp://me:{}@here", "me:{}@here", "http://me:{}@here:0"])
def test_a_url_is_shown_without_its_password(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FreestepError) as refused, Client(url.format(PLANTED), retry_for=0.3) as client:
        client.runs()
    assert PLANTED not in str(refused.value)
    assert PLANTED not in caplog.text


def test_a_running_service_logs_none(
    start_service: Callable[..., ThreadService], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    service = start_service(access_log=True)
    api = Api(service.url)
    api.create()
    lease = api.lease()
    answers = [api.push(lease, 0), api.push(lease, 9), api.http.get("/nowhere"), api.http.put(api.path(), content=b"{")]

    def fail() -> bytes:
        raise RuntimeError("planted")

    monkeypatch.setattr(service.app.state.context.metrics, "expose", fail)
    answers += [api.http.get("/metrics")]
    assert [answer.status_code for answer in answers] == [200, 400, 404, 422, 500]
    for answer in answers:
        assert TOKEN not in answer.text + str(answer.headers)
    assert "planted" in caplog.text
    assert TOKEN not in caplog.text
    api.http.close()


def test_a_service_in_a_process_prints_none(valkey_url: str, tmp_path: Path) -> None:
    settings = {"redis_url": valkey_url, "log_level": "debug", "access_log": True, "port": 0, "data_dir": tmp_path}
    environment = {f"FREESTEP_{name.upper()}": str(value) for name, value in settings.items()}
    with subprocess.Popen(
        [sys.executable, "-m", "freestep.cli", "serve"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = ""
        while (said := "freestep listens on ") not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        url = printed.rpartition(said)[2].strip()
        with httpx.Client(base_url=url, headers=AUTHORIZED) as http:
            assert http.get("/v1/tokens").status_code == 200
        process.terminate()
        printed += process.communicate(timeout=60)[0]
    assert "GET /v1/tokens" in printed
    assert TOKEN not in printed


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/var/lib/a@b?c", "/var/lib/a@b?c"),
        ("redis://:pa@ss@host:1/0", "redis://host:1/0"),
        ("redis://host/0?password=p#x", "redis://host/0"),
        ("s3://bucket/folder", "s3://bucket/folder"),
        ("filecache::s3://key:p/a@bucket/x?secret=1", "filecache::s3://bucket/x"),
    ],
)
def test_what_is_shown_of_a_place(place: str, expected: str) -> None:
    assert shown(place) == expected
