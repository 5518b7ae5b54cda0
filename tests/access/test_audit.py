"""The audit log: admin acts and refusals, by whom and with what result, and no secret in it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect

from freestep.api.token_form import make_token
from freestep_service.access.audit import AuditLog, Deed, whose
from freestep_service.access.tokens import Tokens
from freestep_service.domain.tokens import Token, digest_of
from harness import TOKEN, ThreadService
from meanwhile import under_way
from plain_calls import Api, slug
from small_disk import small_disk

DEED = Deed("me 1", "127.0.0.1", "delete_run", "mnist", 204)
REFUSAL = Deed(None, "127.0.0.1", "show_run", "mnist", "unauthenticated")


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
    files = [service.settings.data_dir / name for name in ("audit.jsonl", "refusals.jsonl")]
    noted, strangers = map(lines, files)
    whom = f"admin-token {admin['id']}"
    bearer = f"bound {made['id']}"
    assert [(each["who"], each["what"], each["run"], each["result"]) for each in noted] == [
        (whom, "create_token", None, 201),
        (bearer, "delete_run", "mnist", "forbidden"),
        (bearer, "grant_lease", "mnist", "forbidden"),
        (whom, "delete_run", "none", "run-not-found"),
        (whom, "delete_run", "mnist", 204),
        (whom, "revoke_token", None, 204),
        (whom, "list_tokens", None, 200),
    ]
    assert [(each["who"], each["what"], each["run"], each["result"]) for each in strangers] == [
        (None, "release_lease", "mnist", "unauthenticated")
    ] * 3
    assert {each["peer"] for each in noted + strangers} == {"127.0.0.1"}
    assert all(each["time"].endswith("+00:00") for each in noted + strangers)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    for secret in (TOKEN, unknown, mistyped, made["token"], lease["lease"], "in-a-query"):
        assert not any(secret in file.read_text() for file in files)


@pytest.mark.parametrize(
    ("error", "status", "result"),
    [
        (RuntimeError("half way"), 500, "internal-server-error"),
        (OSError(errno.ENOSPC, "No space left on device"), 507, "storage-unavailable"),
        (TimeoutError(), 500, "internal-server-error"),
    ],
)
def test_an_act_that_failed_half_way_is_noted(
    start_service: Callable[..., ThreadService],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    result: str,
) -> None:
    async def broken(self: Tokens, token_id: str) -> None:
        raise error

    monkeypatch.setattr(Tokens, "revoke", broken)
    service = start_service()
    with closing(Api(service.url).http) as http:
        assert http.delete("/v1/tokens/any").status_code == status
        assert slug(http.post("/v1/tokens", json={})) == "malformed-request"
    service.stop()
    (noted,) = lines(service.settings.data_dir / "audit.jsonl")
    assert (noted["what"], noted["result"]) == ("revoke_token", result)


def test_an_act_whose_client_is_gone_is_noted(
    start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unheard(self: Tokens, token_id: str) -> None:
        raise ClientDisconnect

    monkeypatch.setattr(Tokens, "revoke", unheard)
    service = start_service()
    with closing(Api(service.url).http) as http:
        # Whatever it is answered with.
        http.delete("/v1/tokens/any")
    service.stop()
    (noted,) = lines(service.settings.data_dir / "audit.jsonl")
    assert (noted["what"], noted["result"]) == ("revoke_token", "disconnected")


def test_an_act_that_a_shutdown_cuts_short_is_noted(
    start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun = threading.Event()

    async def endless(self: Tokens, token_id: str) -> None:
        has_begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Tokens, "revoke", endless)
    service = start_service()
    with closing(Api(service.url).http) as http:
        revoking = under_way(lambda: http.delete("/v1/tokens/any"))
        assert has_begun.wait(60)
        service.stop()
        assert slug(revoking.result(60)) == "shard-unavailable"
    (noted,) = lines(service.settings.data_dir / "audit.jsonl")
    assert (noted["what"], noted["result"]) == ("revoke_token", "shard-unavailable")


@pytest.mark.parametrize("run", ["%00" * 20_000, "%F0%9F%98%80" * 5_000, "a" * 60_000, "%0A"])
def test_what_can_be_no_runs_name_is_in_no_line(start_service: Callable[..., ThreadService], run: str) -> None:
    service = start_service()
    with closing(Api(service.url).http) as http:
        made = http.post("/v1/tokens", json={"name": "bound", "scope": "read", "runs": "a-*"}).json()
    for headers in ({}, {"Authorization": f"Bearer {made['token']}"}):
        answer = httpx.delete(f"{service.url}/v1/runs/{run}", headers=headers)
        assert answer.status_code == (403 if headers else 401)
        assert len(answer.content) < 5_000
    service.stop()
    for name in ("audit.jsonl", "refusals.jsonl"):
        (*_, line) = (service.settings.data_dir / name).read_text().splitlines()
        assert len(line) < 300 and json.loads(line)["run"] is None and json.loads(line)["what"] == "delete_run"


def test_strangers_leave_out_and_rotate_out_nothing_of_others(
    start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep_service.access.audit._LARGEST", 500)
    monkeypatch.setattr("freestep_service.access.audit._MOST_WAITING", 2)
    service = start_service()
    audit, held = service.app.state.context.audit, threading.Event()
    for thread in (audit._acts._thread, audit._refusals._thread):
        thread.submit(held.wait, 60)
    with closing(Api(service.url).http) as http:
        for number in range(40):
            assert httpx.get(f"{service.url}/v1/runs/x", headers={"Host": "x.example"} if number % 2 else {}).is_error
            if number % 20 == 0:
                assert http.delete(f"/v1/tokens/none-{number}").status_code == 404
        held.set()
        for _ in range(20):
            assert httpx.get(f"{service.url}/v1/runs/x").status_code == 401
    service.stop()
    folder = service.settings.data_dir
    assert [each["result"] for each in lines(folder / "audit.jsonl")] == ["token-not-found"] * 2
    assert not (folder / "audit.jsonl.1").exists()
    assert (folder / "refusals.jsonl.1").exists()


def test_processes_share_it(tmp_path: Path) -> None:
    logs = [AuditLog(tmp_path) for _ in range(2)]
    for _ in range(50):
        for log in logs:
            log.note(DEED)
    for log in logs:
        log.close()
    assert len(lines(tmp_path / "audit.jsonl")) == 100


def test_it_is_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.access.audit._LARGEST", 1000)
    log = AuditLog(tmp_path)
    for _ in range(100):
        log.note(DEED)
        log.note_stranger(REFUSAL)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert {file.name for file in files} >= {"audit.jsonl.1", "refusals.jsonl.1"}
    assert all(file.stat().st_size < 1500 and lines(file) for file in files)


def test_what_another_process_has_rotated_is_not_rotated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.access.audit._LARGEST", 100)
    log, file, older = AuditLog(tmp_path), tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    write = os.write

    def meanwhile(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data)
        file.rename(older)
        file.write_text('{"newer": true}\n')
        return written

    monkeypatch.setattr(os, "write", meanwhile)
    log.note(DEED)
    log.close()
    assert [each["what"] for each in lines(older)] == ["delete_run"]
    assert lines(file) == [{"newer": True}]


def test_lines_are_short(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.note(replace(DEED, who="oidc " + "\0" * 10_000, peer="x" * 10_000))
    log.close()
    assert len((tmp_path / "audit.jsonl").read_text()) < 5_000


def test_subjects_with_one_long_beginning_are_told_apart(tmp_path: Path) -> None:
    """As a line is cut, a subject could else be made to read as another one's name and id."""
    log = AuditLog(tmp_path)
    tokens = [Token(f"oidc alice 0123456789ab{' ' * 300}{end}", "push", digest_of(end), 0) for end in "ab"]
    for token in tokens:
        log.note(replace(DEED, who=whose(token)))
    log.close()
    assert [each["who"].rpartition(" ")[2] for each in lines(tmp_path / "audit.jsonl")] == [each.id for each in tokens]


def test_refusals_of_strangers_without_end_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freestep_service.access.audit._MOST_WAITING", 5)
    log, held = AuditLog(tmp_path), threading.Event()
    for lines_of in (log._acts, log._refusals):
        lines_of._thread.submit(held.wait, 60)
    for _ in range(12):
        log.note_stranger(REFUSAL)
        log.note(DEED)
    held.set()
    log._refusals._thread.submit(int).result()
    log.note_stranger(REFUSAL)
    log.close()
    assert [each.get("left_out_before", 0) for each in lines(tmp_path / "refusals.jsonl")] == [0, 0, 0, 0, 0, 7]
    assert len(lines(tmp_path / "audit.jsonl")) == 12


def test_a_disk_that_takes_nothing_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "elsewhere")
    log = AuditLog(tmp_path)
    for _ in range(3):
        log.note(DEED)
    log.close()
    assert caplog.text.count("cannot be written") == 1
    assert (tmp_path / "elsewhere").read_text() == ""


def test_a_line_that_a_full_disk_cuts_joins_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", kib=12) as disk, (disk / "other").open("wb") as other:
        other.write(bytes(4096))
        other.flush()
        log = AuditLog(disk)
        for _ in range(100):
            log.note(DEED)
        log._acts._thread.submit(other.truncate, 0)
        for _ in range(5):
            log.note(replace(DEED, what="create_token"))
        log.close()
        found = [each["what"] for each in lines(disk / "audit.jsonl")]
    assert set(found[:-5]) == {"delete_run"} and found[-5:] == ["create_token"] * 5
    assert caplog.text.count("cannot be written") == 1


def test_a_line_behind_half_a_line_is_one_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    file.write_text('{"what": "a power cut')
    log = AuditLog(tmp_path)
    for _ in range(2):
        log.note(DEED)
    log.close()
    half, *whole = file.read_text().splitlines()
    assert half == '{"what": "a power cut'
    assert [json.loads(line)["what"] for line in whole] == ["delete_run"] * 2
