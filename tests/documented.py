"""What services answer, compared with their OpenAPI document: every service of the tests is asked, in every test."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freestep_service.app import create_app
from freestep_service.settings import Settings
from freestep_service.web.relay import RELAYED

_OF_HTTP = {"content-length", "content-type", "connection", "date", "server", "transfer-encoding"}
"""Headers of any answer (RFC 9110), which the document need not name."""


class Document:
    """An OpenAPI document, asked for what an operation may answer."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._paths = [
            (re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), operations)
            for path, operations in document["paths"].items()
        ]
        self._schemas = document["components"]["schemas"]

    def operation(self, method: str, path: str) -> dict[str, Any] | None:
        """The operation that a request is for; None where there is none."""
        wanted = "get" if method == "HEAD" else method.lower()
        for pattern, operations in self._paths:
            if pattern.fullmatch(path) and wanted in operations:
                return dict(operations[wanted])
        return None

    def members(self, response: Mapping[str, Any], problem: Mapping[str, Any]) -> set[str] | None:
        """The members that a problem may have as a response; None where it may not be that problem."""
        schema = response["content"]["application/problem+json"]["schema"]
        for each in schema.get("oneOf", [schema]):
            properties = self._schemas[each["$ref"].rpartition("/")[2]]["properties"]
            if properties["type"]["const"] == problem["type"]:
                return set(properties)
        return None

    def faults(self, operation: Mapping[str, Any], status: int, headers: Mapping[str, str], body: bytes) -> list[str]:
        """In what an operation's answer is not as the document says."""
        response = operation["responses"].get(str(status))
        if response is None:
            return [f"the status {status} is not documented: {body[:300]!r}"]
        known = {name.lower(): header for name, header in response.get("headers", {}).items()}
        faults = [f"{status}: the header {name} is not documented" for name in headers.keys() - known.keys() - _OF_HTTP]
        needed = {name for name, header in known.items() if header["required"]}
        faults += [f"{status}: the header {name} is missing" for name in needed - headers.keys()]
        media_type = headers.get("content-type", "").partition(";")[0]
        if media_type not in response.get("content", {"": None}):
            faults.append(f"{status}: the media type {media_type!r} is not documented")
        elif media_type == "application/problem+json" and body:
            problem = json.loads(body)
            members = self.members(response, problem)
            if members is None:
                faults.append(f"{status}: the problem {problem['type']} is not documented")
            else:
                faults += [f"{problem['type']}: {name} is not documented" for name in problem.keys() - members]
        return faults


UNDOCUMENTED: list[str] = []
"""In what answers were not as documented; a test during which it grows has failed."""


@cache
def openapi() -> dict[str, Any]:
    """The document of all services, to be left as it is: it takes most of a second to make."""
    return create_app(Settings()).openapi()


@cache
def _document() -> Document:
    return Document(openapi())


class Documented:
    """ASGI middleware that notes in what an app's answers are not as documented."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._document = _document()
        self.answered: Counter[tuple[str, int]] = Counter()
        """How often an operation was answered with a status, by the operation's name and the status."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or any(name.decode() == RELAYED for name, _ in scope["headers"]):
            # What processes say to each other is their own.
            await self._app(scope, receive, send)
            return
        status, headers, body = 0, {}, b""

        async def note(message: Message) -> None:
            nonlocal status, headers, body
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
            elif status >= 400:
                body += message.get("body", b"")
            await send(message)

        await self._app(scope, receive, note)
        operation = self._document.operation(scope["method"], scope["path"])
        if status and operation:
            self.answered[operation["operationId"], status] += 1
            for fault in self._document.faults(operation, status, headers, body):
                UNDOCUMENTED.append(f"{scope['method']} {scope['path']}: {fault}")
