"""Refusals on the wire: RFC 9457 problem documents, and the only place where status codes stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from freestep import errors
from freestep.errors import InvalidSpec, MalformedRequest, ProblemError

__all__ = ["DOCUMENTED", "MEDIA_TYPE", "STATUSES", "install", "problem_response"]

MEDIA_TYPE = "application/problem+json"

STATUSES: dict[type[ProblemError], int] = {
    errors.MalformedRequest: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.RunNotFound: 404,
    errors.CheckpointNotFound: 404,
    errors.RunExists: 409,
    errors.RunNotInitialized: 409,
    errors.EpochChanged: 409,
    errors.IdempotencyConflict: 409,
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
    errors.CoordinatorUnavailable: 503,
    errors.ShardUnavailable: 503,
    errors.StepNotReached: 504,
    errors.StorageUnavailable: 507,
}

_PROBLEM = {
    "description": "A problem, RFC 9457; its type ends with its slug.",
    "content": {
        MEDIA_TYPE: {
            "schema": {
                "type": "object",
                "required": ["type", "title", "status", "detail"],
                "properties": {
                    "type": {"type": "string", "examples": ["urn:freestep:problem:run-not-found"]},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                },
            }
        }
    },
}
DOCUMENTED: dict[int | str, dict[str, Any]] = {"4XX": _PROBLEM, "5XX": _PROBLEM, 422: _PROBLEM}
"""What the OpenAPI document says of refusals, in place of FastAPI's own 422."""

_FASTAPI_WORDS: dict[int, type[ProblemError]] = {400: errors.MalformedRequest, 413: errors.BodyTooLarge}
"""What is said of a JSON body that FastAPI cannot parse, or that limits.py lets no further."""

_RETRY_AFTER_S = {errors.Overloaded: 1, errors.CoordinatorUnavailable: 1, errors.ShardUnavailable: 1}


def problem_response(problem: ProblemError) -> JSONResponse:
    """The answer to a refused request."""
    status = STATUSES[type(problem)]
    headers = {}
    if retry_after := _RETRY_AFTER_S.get(type(problem)):
        headers["Retry-After"] = str(retry_after)
    if isinstance(problem, errors.RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{problem.extensions['size']}"
    return JSONResponse(problem.to_document(status), status, headers, MEDIA_TYPE)


def install(app: FastAPI, observe: Callable[[str], None]) -> None:
    """Makes every error answer of an app a problem document; `observe` is told each one's slug."""

    async def on_problem(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ProblemError)
        observe(error.slug)
        return problem_response(error)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await on_problem(request, _from_validation(error, request.scope["route"].name))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if problem := _FASTAPI_WORDS.get(error.status_code):
            return await on_problem(request, problem(error.detail))
        title = HTTPStatus(error.status_code).phrase
        document = {
            "type": "about:blank",
            "title": title,
            "status": error.status_code,
            "detail": error.detail,
        }
        return JSONResponse(document, error.status_code, error.headers, MEDIA_TYPE)

    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)


def _from_validation(error: RequestValidationError, route: str) -> ProblemError:
    """invalid-spec where a run's spec is wrong, malformed-request for everything else."""
    faults = [{"field": _field(detail), "message": detail["msg"]} for detail in error.errors()]
    summary = "; ".join(f"{fault['field']}: {fault['message']}" for fault in faults[:5])
    is_spec = route == "create_run" and all(
        detail["loc"][0] == "body" and detail["type"] != "json_invalid" for detail in error.errors()
    )
    problem = InvalidSpec if is_spec else MalformedRequest
    return problem(summary, field=faults[0]["field"], errors=faults[:20])


def _field(detail: Mapping[str, Any]) -> str:
    """The path of a field as the client wrote it."""
    return ".".join(map(str, detail["loc"][1:])) or str(detail["loc"][0])
