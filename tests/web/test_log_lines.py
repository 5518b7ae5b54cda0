"""The service's log: lines for people and of JSON, each event one line, with the fields that programs look for."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import forked
from freestep_service.log_lines import JsonLines, PeoplesLines, set_up_logging
from harness import ThreadService, wait_ready
from meanwhile import wait_until
from plain_calls import Api
from ports import free_port

ATTACK = 'w\n2026-01-01 00:00:00,000 ERROR freestep: all is lost\x1b[2J"}'


def record(message: str, *arguments: object, error: bool = False, **fields: object) -> logging.LogRecord:
    made = logging.getLogger("freestep").makeRecord(
        "freestep", logging.INFO, "file.py", 1, message, arguments, sys.exc_info() if error else None, extra=fields
    )
    made.created = 0.25
    return made


def test_an_event_is_one_line_whatever_its_names() -> None:
    told = record("run %s: worker %s came", "r", ATTACK, worker=ATTACK)
    people, program = PeoplesLines().format(told), JsonLines().format(told)
    assert "\n" not in people + program
    assert "\x1b" not in people + program
    assert people.endswith(
        r'freestep: run r: worker w\n2026-01-01 00:00:00,000 ERROR freestep: all is lost\x1b[2J"} came'
    )
    assert json.loads(program) == {
        "time": "1970-01-01T00:00:00.250+00:00",
        "level": "info",
        "logger": "freestep",
        "message": f"run r: worker {ATTACK} came",
        "run": "r",
        "worker": ATTACK,
    }


def test_a_traceback_is_a_field() -> None:
    try:
        raise ValueError("planted")
    except ValueError:
        told = record("it failed", error=True, run="r", path=Path("x"))
    document = json.loads(JsonLines().format(told))
    assert document["error"].splitlines()[-1] == "ValueError: planted"
    assert (document["run"], document["path"]) == ("r", "x")
    assert PeoplesLines().format(told).splitlines()[-1] == "ValueError: planted"


def test_debug_is_of_the_service_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries tell what they send, a storage's signed requests among it."""
    own, root = logging.getLogger("freestep"), logging.getLogger()
    for logger in (own, root):
        monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(root, "handlers", [])
    for level, of_libraries in (("debug", logging.INFO), ("error", logging.ERROR)):
        root.handlers.clear()
        set_up_logging(level, "text")
        assert logging.getLevelName(own.level) == level.upper()
        assert root.level == of_libraries


def lived(api: Api, worker: str) -> str:
    """A run that is created, pushed to, gone back, and deleted; the key of its push."""
    api.create()
    lease = api.lease(worker)
    assert api.push(lease, 0, "a-key").status_code == 200
    assert api.push(lease, 7, "another").status_code == 400
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    assert api.http.post(api.path("/checkpoints/1/restore")).status_code == 200
    api.lease("brief", ttl_ms=100)
    assert api.http.patch(api.path(), json={"optimizer": {"lr": 0.125}}).status_code == 200
    api.lease("unwanted")
    assert api.http.delete(api.path("/workers/unwanted")).status_code == 200
    return "a-key"


def test_what_operators_ask_has_a_line(api: Api, service: ThreadService, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="freestep")
    lived(api, "me")

    def lines(**fields: object) -> list[str]:
        documents = [json.loads(JsonLines().format(each)) for each in caplog.records if each.name == "freestep"]
        return [each["message"] for each in documents if ({"run": api.run} | fields).items() <= each.items()]

    wait_until(lambda: bool(lines(worker="brief", change="expired")))
    assert lines(worker="me", change="granted") == [f"run {api.run}: the lease of worker me is granted"]
    (push,) = lines(worker="me", key="a-key", step=1, decision="applied", staleness=0)
    assert push.startswith(f"run {api.run}: push a-key of worker me is applied at step 1, staleness 0, after ")
    written = [line for line in lines(step=1, epoch=1) if "a checkpoint of step 1 was written in" in line]
    assert written
    assert f"run {api.run} went back to the checkpoint of step 1" in lines(step=1)
    assert [line for line in lines() if line.startswith(f"run {api.run} is created: sgd")]
    assert [line for line in lines() if line == f"run {api.run} is open: epoch 2, step 1"]
    (changed,) = [line for line in lines() if " is changed by " in line]
    assert changed.endswith(': {"optimizer":{"lr":0.125}}')
    assert lines(worker="unwanted", change="ended")
    (refused,) = [each for each in caplog.records if vars(each).get("key") == "another"]
    assert vars(refused)["slug"] == "malformed-request"
    api.http.delete(api.path())
    assert f"run {api.run} is deleted" in lines()


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """Runs a service in a process with a format of its lines; what it has written to stderr while a run lived."""

    def run(format: str) -> list[str]:
        streams = [tmp_path / name for name in ("in", "out", "err")]
        for stream in streams:
            stream.write_text("")
        port = free_port()
        settings: dict[str, Any] = {
            "log_format": format, "log_level": "debug", "access_log": True, "port": port, "data_dir": tmp_path / "data",
        }  # fmt: skip
        environment = {f"FREESTEP_{name.upper()}": str(value) for name, value in settings.items()}
        process = forked.start("serve", streams=streams, **environment)
        api = Api(f"http://127.0.0.1:{port}")
        try:
            wait_ready(api.url, process.is_alive)
            lived(api, "w</script>")
        finally:
            api.http.close()
            process.terminate()
            forked.join(process)
        return [line for line in streams[2].read_text().splitlines() if line]

    yield run


def test_a_service_logs_json(logged: Callable[[str], list[str]]) -> None:
    documents = [json.loads(line) for line in logged("json")]
    assert all({"time", "level", "logger", "message"} <= each.keys() for each in documents)
    assert {each["logger"] for each in documents} >= {"freestep", "uvicorn.error", "uvicorn.access"}
    assert [each for each in documents if each.get("key") == "a-key" and each.get("worker") == "w</script>"]
    assert documents[0]["message"].startswith("freestep ") or documents[0]["logger"] != "freestep"


def test_a_service_logs_for_people(logged: Callable[[str], list[str]]) -> None:
    lines = logged("text")
    assert [line for line in lines if "INFO freestep: freestep " in line and "Redis at" in line]
    assert [line for line in lines if "the lease of worker w</script> is granted" in line]
