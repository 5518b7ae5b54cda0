"""The OpenAPI document as a whole: what no single operation says, and how it is sent."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from freestep.api.events import TOLD
from freestep_service.web.problem_documents import problem_schemas
from freestep_service.web.responses import not_modified

__all__ = ["DESCRIPTION", "EVENTS", "TAGS", "document_problems", "send_rendered"]

DESCRIPTION = """\
A run is one model in training. Workers take a lease, pull the point y and push gradients; evaluators pull the average,
x. Tensors travel as safetensors, everything else as JSON.

A refusal is a problem document (RFC 9457) whose type ends with its slug; it has changed nothing, and what is answered
with 429 or 503 may be repeated after `Retry-After`. HEAD is answered wherever GET is. Paths that are not described here
are answered with 404, and other methods with 405 and `Allow`.
"""

TAGS = [
    {"name": "gradients", "description": "Pushes: gradients in, receipts or fresh parameters out."},
    {"name": "leases", "description": "What admits a worker to a run for a while, with a fencing token."},
    {"name": "parameters", "description": "Initial weights in, points out: x averaged, y to train at, z the base."},
    {"name": "runs", "description": "Runs: create, list, status, shards, delete."},
    {"name": "control", "description": "Changes of a run while it trains."},
    {"name": "state", "description": "The whole state of a run: out of one service, into another."},
    {"name": "checkpoints", "description": "What a run returns to after a crash, or when it is restored."},
    {"name": "metrics", "description": "What evaluators have measured at x."},
    {"name": "events", "description": "What happens to a run, as it happens."},
    {"name": "data", "description": "Data sets: their units are handed out, and each counts once in a pass."},
    {"name": "tokens", "description": "Bearer tokens: make, list, revoke."},
    {"name": "health", "description": "Liveness, readiness, Prometheus metrics."},
]


EVENTS: dict[str, Any] = {
    "description": "Server-sent events, whose `event` is the kind and whose `data` is the event as JSON.",
    "content": {
        "text/event-stream": {
            # As FastAPI has it for streams of its own: the word is of OpenAPI 3.2.
            "itemSchema": {
                "type": "object",
                "properties": {
                    "event": {"type": "string"},
                    "id": {"type": "string"},
                    "retry": {"type": "integer"},
                    "data": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": {"$ref": "#/components/schemas/RunEvent"},
                    },
                },
            }
        }
    },
}


def _event_schemas() -> dict[str, dict[str, Any]]:
    """A schema for each kind of event, and one of them all: nothing that FastAPI sees has them."""
    union = TOLD.json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    kinds: dict[str, dict[str, Any]] = union.pop("$defs")
    return {**kinds, "RunEvent": union}


def document_problems(app: FastAPI) -> None:
    """Has an app's OpenAPI document define what its responses refer to, problems and events, and leave out FastAPI's
    own refusals, which are not given here."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        schemas = document["components"]["schemas"]
        schemas |= problem_schemas()
        schemas |= _event_schemas()
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for operations in document["paths"].values():
            for operation in operations.values():
                if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                    del operation["responses"]["422"]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def send_rendered(app: FastAPI) -> None:
    """Has an app render its document once, beside the event loop, and send it as it is from then on."""
    document = _RenderedDocument(app)
    routes = app.router.routes
    path = app.openapi_url
    assert path is not None
    [at] = [index for index, route in enumerate(routes) if isinstance(route, Route) and route.path == path]
    routes[at] = Route(path, document.answer, include_in_schema=False)


class _RenderedDocument:
    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._turn = asyncio.Lock()
        self._content: bytes | None = None
        self._headers: dict[str, str] = {}

    async def answer(self, request: Request) -> Response:
        async with self._turn:
            if self._content is None:
                self._content = await asyncio.to_thread(self._render)
        return not_modified(request, self._headers) or Response(
            self._content, headers=self._headers, media_type=JSONResponse.media_type
        )

    def _render(self) -> bytes:
        content = bytes(JSONResponse(self._app.openapi()).body)
        # Another version of the service has another.
        self._headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"', "Cache-Control": "no-cache"}
        return content
