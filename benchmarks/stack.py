"""The stack alone: a process with a FastAPI app under uvicorn that takes a body and answers with it, and does nothing
else. `python -m benchmarks.stack` is that process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from fastapi import FastAPI, Request, Response

from benchmarks.apart import apart, serve

__all__ = ["Stack", "stack_alone"]


class Stack:
    """Such a process, and an httpx client of it."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def exchange(self, body: bytes) -> float:
        """Sends a body and receives it; returns the seconds it took."""
        began = time.perf_counter()
        answer = self._http.post("/echo", content=body)
        seconds = time.perf_counter() - began
        assert answer.content == body
        return seconds


@contextmanager
def stack_alone() -> Iterator[Stack]:
    """A process of its own."""
    with apart("benchmarks.stack") as url, httpx.Client(base_url=url) as http:
        yield Stack(http)


def main() -> None:
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    serve(app)


if __name__ == "__main__":
    main()
