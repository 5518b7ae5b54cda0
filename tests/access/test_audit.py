"""The audit log: admin acts and refusals, by whom and with what result, and no secret in it."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from freestep.api.token_form import make_token
from freestep_service.access.audit import AuditLog, Deed
from harness import TOKEN, ThreadService
from plain_calls import Api, slug

DEED = Deed("me 1", "127.0.0.1", "delete_run", "mnist", 204)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_admin_acts_and_refusals_are_noted_and_nothing_else(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    service = start_service()
    api = connect(service.url, "mnist")
    api.create()
    lease = api.lease()
    api.push(lease, 0)
    made = api.http.post("/v1/tokens", json={"name": "bound", "scope": "push", "workers": "a-*"}).json()
    unknown, mistyped = make_token("admin"), f"{TOKEN[:-1]}x{TOKEN[-1]}"
    path = api.path(f"/leases/{lease['lease']}?secret=in-a-query")
    for token in ("", unknown, mistyped):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        assert httpx.delete(f"{service.url}{path}", headers=headers).status_code == 401
    bound = {"Authorization": f"Bearer {made['token']}"}
    assert httpx.delete(f"{service.url}{api.path()}", headers=bound).status_code == 403
    leases = f"{service.url}{api.path('/leases')}"
    assert slug(httpx.post(leases, json={"worker": "b"}, headers=bound)) == "forbidden"
    assert api.http.get("/v1/runs").status_code == api.http.get("/healthz").status_code == 200
    assert api.http.delete("/v1/runs/none").status_code == 404
    assert api.http.delete(api.path()).status_code == 204
    assert api.http.delete(f"/v1/tokens/{made['id']}").status_code == 204
    admin = next(each for each in api.http.get("/v1/tokens").json()["tokens"] if each["name"] == "admin-token")
    service.stop()
    file = service.settings.data_dir / "audit.jsonl"
    noted = lines(file)
    whom = f"admin-token {admin['id']}"
    bearer = f"bound {made['id']}"
    assert [(each["who"], each["what"], each["run"], each["result"]) for each in noted] == [
        (whom, "create_token", None, 201),
        *[(None, "release_lease", "mnist", "unauthenticated")] * 3,
        (bearer, "delete_run", "mnist", "forbidden"),
        (bearer, "grant_lease", "mnist", "forbidden"),
        (whom, "delete_run", "none", "run-not-found"),
        (whom, "delete_run", "mnist", 204),
        (whom, "revoke_token", None, 204),
        (whom, "list_tokens", None, 200),
    ]
    assert {each["peer"] for each in noted} == {"127.0.0.1"}
    assert all(each["time"].endswith("+00:00") for each in noted)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for secret in (TOKEN, unknown, mistyped, made["token"], lease["lease"], "in-a-query"):
        assert secret not in file.read_text()


def test_processes_share_it(tmp_path: Path) -> None:
    logs = [AuditLog(tmp_path / "audit.jsonl") for _ in range(2)]
    for _ in range(50):
        for log in logs:
            log.note(DEED)
    for log in logs:
        log.close()
    assert len(lines(tmp_path / "audit.jsonl")) == 100


def test_it_is_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.access.audit._LARGEST", 1000)
    log = AuditLog(tmp_path / "audit.jsonl")
    for _ in range(100):
        log.note(DEED)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1"] or len(files) == 1
    assert all(file.stat().st_size < 1500 and lines(file) for file in files)


def test_who_asks_without_end_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.access.audit._MOST_WAITING", 5)
    log, held = AuditLog(tmp_path / "audit.jsonl"), threading.Event()
    log._thread.submit(held.wait)
    for _ in range(12):
        log.note(DEED)
    held.set()
    log._thread.submit(int).result()
    log.note(DEED)
    log.close()
    assert [each.get("left_out_before", 0) for each in lines(tmp_path / "audit.jsonl")] == [0, 0, 0, 0, 0, 7]


def test_a_disk_that_takes_nothing_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "elsewhere")
    log = AuditLog(tmp_path / "audit.jsonl")
    for _ in range(3):
        log.note(DEED)
    log.close()
    assert caplog.text.count("cannot be written") == 1
    assert (tmp_path / "elsewhere").read_text() == ""
