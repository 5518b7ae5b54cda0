"""Problem documents, RFC 9457, for everything that goes wrong; and the only place where status codes stand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from freestep import errors
from freestep.api.validation import reason
from freestep.errors import InvalidSpec, MalformedRequest, ProblemError, StorageUnavailable

__all__ = [
    "INTERNAL_ERROR",
    "MEDIA_TYPE",
    "PLAIN",
    "RETRY_AFTER_S",
    "STATUSES",
    "install",
    "internal_error_response",
    "problem_of",
    "problem_response",
    "unsupported_transfer_coding_response",
    "unsupported_version_response",
]

logger = logging.getLogger("freestep")

MEDIA_TYPE = "application/problem+json"

STATUSES: dict[type[ProblemError], int] = {
    errors.MalformedRequest: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.WorkerBanned: 403,
    errors.WorkerSuspended: 403,
    errors.RunNotFound: 404,
    errors.CheckpointNotFound: 404,
    errors.TokenNotFound: 404,
    errors.DataNotFound: 404,
    errors.RunExists: 409,
    errors.RunNotInitialized: 409,
    errors.EpochChanged: 409,
    errors.IdempotencyConflict: 409,
    errors.DataExists: 409,
    errors.UnitNotHeld: 409,
    errors.MemoryNotShared: 409,
    errors.RequestTimeout: 408,
    errors.LeaseExpired: 410,
    errors.LengthRequired: 411,
    errors.AlreadyInitialized: 412,
    errors.BodyTooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.RangeNotSatisfiable: 416,
    errors.InvalidSpec: 422,
    errors.MalformedTensors: 422,
    errors.NonFiniteGradient: 422,
    errors.Overloaded: 429,
    errors.HeadersTooLarge: 431,
    errors.CoordinatorUnavailable: 503,
    errors.IssuerUnavailable: 503,
    errors.RunPaused: 503,
    errors.ShardUnavailable: 503,
    errors.StepNotReached: 504,
    errors.StorageUnavailable: 507,
}

PLAIN = (
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.NOT_IMPLEMENTED,
    HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
)
"""The statuses that any request may be answered with, and that say all there is to say."""
_LONGEST_SHOWN = 1000
"""Characters of a field's path or of a fault, which may have names in them that the client chose."""

INTERNAL_ERROR = "internal-server-error"
"""The name under which unexpected errors are counted; clients get no slug, since none is to be acted on."""

RETRY_AFTER_S = {
    errors.Overloaded: 1,
    errors.CoordinatorUnavailable: 1,
    errors.IssuerUnavailable: 5,
    errors.RunPaused: 5,
    errors.ShardUnavailable: 1,
    errors.WorkerSuspended: 1,
}


def problem_response(problem: ProblemError) -> JSONResponse:
    """The answer to a refused request."""
    # Parts of the service have classes of their own for some.
    kind = errors.PROBLEMS[problem.slug]
    status = STATUSES[kind]
    headers = {}
    if retry_after := problem.retry_after or RETRY_AFTER_S.get(kind):
        headers["Retry-After"] = f"{retry_after:.0f}"
    if isinstance(problem, errors.RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{problem.extensions['size']}"
    scope = problem.extensions.get("scope")
    if scope or isinstance(problem, errors.Unauthenticated):
        headers["WWW-Authenticate"] = _challenge(problem, scope)
    return JSONResponse(problem.to_document(status), status, headers, MEDIA_TYPE)


def _challenge(problem: ProblemError, scope: str | None) -> str:
    """What a token has to be, RFC 6750; the detail says it to people. Every 401 has one: RFC 9110, section 15.5.2."""
    error = ', error="insufficient_scope"' if isinstance(problem, errors.Forbidden) else ""
    return f'Bearer realm="freestep"{error}' + (f', scope="{scope}"' if scope else "")


def internal_error_response() -> JSONResponse:
    """The answer to a request that failed for a reason of the service's own."""
    # What it has read of the request, and what not, is unknown.
    headers = {"Connection": "close"}
    return _plain_response(HTTPStatus.INTERNAL_SERVER_ERROR, "the service failed; its log has the traceback", headers)


def unsupported_version_response(version: str) -> JSONResponse:
    """The answer to a request line that names another version of HTTP."""
    return _plain_response(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"the service speaks HTTP/1.1, and not {version}")


def unsupported_transfer_coding_response() -> JSONResponse:
    """The answer to a body that is coded otherwise than in chunks."""
    return _plain_response(HTTPStatus.NOT_IMPLEMENTED, "the only Transfer-Encoding of bodies is chunked")


def _plain_response(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A problem that its status code describes fully, RFC 9457 section 4.2.1."""
    title = HTTPStatus(status).phrase
    document = {"type": "about:blank", "title": title, "status": int(status), "detail": detail}
    return JSONResponse(document, status, headers, MEDIA_TYPE)


def install(app: FastAPI, observe: Callable[[str], None]) -> None:
    """Makes every refusal of an app a problem document; `observe` is called with the slug of each."""

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ProblemError)
        observe(error.slug)
        if logger.isEnabledFor(logging.DEBUG):
            fields = {"slug": error.slug, "key": request.headers.get("idempotency-key")}
            told = {name: value for name, value in fields.items() if value is not None}
            logger.debug("%s %s is refused: %s", request.method, request.url.path, error, extra=told)
        return problem_response(error)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await on_problem(request, _from_validation(error, request.scope["route"].name))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == STATUSES[MalformedRequest]:
            # A JSON body that FastAPI cannot parse.
            return await on_problem(request, MalformedRequest(error.detail))
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = _allowed(request)
        return _plain_response(error.status_code, error.detail, headers)

    async def on_os_error(request: Request, error: Exception) -> JSONResponse:
        problem = problem_of(error)
        if problem is None:
            raise error
        logger.warning("%s %s: the storage failed: %s", request.method, request.url.path, error)
        return await on_problem(request, problem)

    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(OSError, on_os_error)


def problem_of(error: BaseException) -> ProblemError | None:
    """The refusal that an error is answered with; None of an unexpected one."""
    if isinstance(error, ProblemError):
        return error
    # The others are of connections, not of files.
    if isinstance(error, OSError) and not isinstance(error, TimeoutError | ConnectionError):
        return StorageUnavailable(error.strerror or type(error).__name__)
    return None


def _allowed(request: Request) -> str:
    """The methods of all routes that a path has, as Allow names them; a route knows its own only."""
    asked = {name: request.scope[name] for name in ("type", "path", "root_path", "headers")}

    def is_there(method: str) -> bool:
        return any(route.matches({**asked, "method": method})[0] is Match.FULL for route in request.app.routes)

    methods = [method for method in ("DELETE", "GET", "PATCH", "POST", "PUT") if is_there(method)]
    return ", ".join(methods + (["HEAD"] if "GET" in methods else []))


def _from_validation(error: RequestValidationError, route: str) -> ProblemError:
    """invalid-spec where a run's spec is wrong, malformed-request for everything else."""
    faults = [{"field": _field(detail), "message": reason(detail)[:_LONGEST_SHOWN]} for detail in error.errors()[:20]]
    summary = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults[:5])
    is_spec = route in ("create_run", "change_run") and all(
        detail["loc"][0] == "body" and detail["type"] != "json_invalid" for detail in error.errors()
    )
    problem = InvalidSpec if is_spec else MalformedRequest
    return problem(summary, field=faults[0]["field"], errors=faults)


def _field(detail: Mapping[str, Any]) -> str:
    """The path of a field as the client wrote it."""
    return (".".join(map(str, detail["loc"][1:])) or str(detail["loc"][0]))[:_LONGEST_SHOWN]
