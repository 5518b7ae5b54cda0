"""Requests to ASGI applications, without a server or a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request


def scope_of(method: str, target: str, headers: Mapping[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """The scope of a request, as the service's server makes it."""
    path, _, query = target.partition("?")
    lines = {"Host": "127.0.0.1:8000", **(headers or {})}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in lines.items()],
        "client": ("127.0.0.1", 1234),
        "server": ("127.0.0.1", 8000),
        **more,
    }


def request_of(method: str, target: str, headers: Mapping[str, str] | None = None, **more: Any) -> Request:
    """A request whose body is empty."""
    return Request(scope_of(method, target, headers, **more), Sender(()).receive)


@dataclass
class Sender:
    """The client's side of a request: sends the chunks of a body, and waits for the answer."""

    chunks: Iterable[bytes]
    sent: int = 0
    _is_over: bool = False

    async def receive(self) -> dict[str, Any]:
        self.chunks = iter(self.chunks)
        if (chunk := next(self.chunks, None)) is not None:
            self.sent += len(chunk)
            return {"type": "http.request", "body": chunk, "more_body": True}
        if self._is_over:
            await asyncio.Event().wait()
        self._is_over = True
        return {"type": "http.request", "body": b"", "more_body": False}


@dataclass
class Answer:
    """What an application answered."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_complete: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
        else:
            self.body += bytes(message.get("body", b""))
            self.is_complete = not message.get("more_body", False)


def call(app: Callable[..., Awaitable[None]], scope: Any, sender: Sender | None = None) -> Answer:
    """An application's answer to a request. Raises what the application raises."""
    answer = Answer()
    asyncio.run(asyncio.wait_for(app(scope, (sender or Sender(())).receive, answer.send), 30))
    return answer
