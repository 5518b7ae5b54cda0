"""Whatever goes wrong is a problem document for the client, and a line or a traceback in the log."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect

from asgi_calls import Answer, call, scope_of
from freestep.errors import RunNotFound
from freestep_service.web import problems
from freestep_service.web.connection import CONNECTION
from freestep_service.web.error_boundary import ErrorBoundary


def failing(error: BaseException, observe: Callable[[str], None] = lambda _: None) -> FastAPI:
    """A service that answers every request with an exception."""
    app = FastAPI()
    app.add_middleware(ErrorBoundary, observe=observe)
    problems.install(app, observe)

    @app.get("/fails")
    async def fails() -> None:
        raise error

    return app


@pytest.mark.parametrize("error", [ValueError("a bug"), TimeoutError(), ConnectionResetError(), KeyError("phase")])
def test_an_unexpected_error_is_a_problem_and_a_traceback(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    counted: list[str] = []
    answer = call(failing(error, counted.append), scope_of("GET", "/fails"))
    assert (answer.status, answer.headers["content-type"]) == (500, "application/problem+json")
    assert answer.json()["title"] == "Internal Server Error"
    assert answer.json()["status"] == 500
    (record,) = caplog.records
    assert record.exc_info is not None and record.exc_info[1] is error
    assert counted == ["internal-server-error"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/data/runs"),
        PermissionError(errno.EROFS, "Read-only file system"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        OSError("a backend's own words"),
    ],
)
def test_an_error_of_the_storage_is_refused_as_such(error: OSError, caplog: pytest.LogCaptureFixture) -> None:
    counted: list[str] = []
    answer = call(failing(error, counted.append), scope_of("GET", "/fails"))
    assert (answer.status, answer.json()["type"]) == (507, "urn:freestep:problem:storage-unavailable")
    assert "/data" not in answer.json()["detail"]
    (record,) = caplog.records
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)
    assert str(error) in record.getMessage()
    assert counted == ["storage-unavailable"]


def test_a_refusal_is_counted_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    counted: list[str] = []
    answer = call(failing(RunNotFound(), counted.append), scope_of("GET", "/fails"))
    assert (answer.status, answer.json()["type"]) == (404, "urn:freestep:problem:run-not-found")
    assert (counted, caplog.records) == (["run-not-found"], [])


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("PUT", "/fails", 405)])
def test_what_is_not_served_is_a_problem(method: str, path: str, status: int) -> None:
    answer = call(failing(ValueError()), scope_of(method, path))
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["status"] == status


class Connection:
    """The connection of a request, as far as it can be aborted."""

    def __init__(self) -> None:
        self.is_aborted = False

    def abort(self, stalled_s: float | None = None) -> None:
        assert stalled_s is None
        self.is_aborted = True


def begun(error: BaseException) -> ErrorBoundary:
    """An application that fails behind the beginning of its answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    return ErrorBoundary(app, lambda _: None)


@pytest.mark.parametrize("error", [ValueError(), asyncio.CancelledError()])
def test_an_answer_that_fails_halfway_ends_with_its_connection(error: BaseException) -> None:
    connection = Connection()
    answer = call(begun(error), scope_of("GET", "/", extensions={CONNECTION: connection}))
    assert connection.is_aborted
    assert not answer.is_complete


@pytest.mark.parametrize("error", [ValueError(), asyncio.CancelledError()])
def test_an_answer_that_fails_halfway_under_another_server(error: BaseException) -> None:
    with pytest.raises(type(error)):
        call(begun(error), scope_of("GET", "/"))


def test_a_client_that_is_gone_is_not_answered(caplog: pytest.LogCaptureFixture) -> None:
    answer = call(failing(ClientDisconnect()), scope_of("GET", "/fails"))
    assert (answer.status, caplog.records) == (0, [])


def test_a_request_that_the_shutdown_cancels_is_refused() -> None:
    begun = asyncio.Event()
    answer = Answer()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def work() -> None:
        boundary = ErrorBoundary(app, lambda _: None)
        request = asyncio.ensure_future(boundary(scope_of("GET", "/"), None, answer.send))
        await begun.wait()
        request.cancel()
        await request

    asyncio.run(asyncio.wait_for(work(), 30))
    assert (answer.status, answer.json()["type"]) == (503, "urn:freestep:problem:shard-unavailable")
