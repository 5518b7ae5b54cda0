"""The stack alone: a process with a FastAPI app under uvicorn that takes a body and answers with one, and does nothing
with either. `python -m benchmarks.stack` is that process."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response

__all__ = ["Stack", "stack_alone"]

_TIMEOUT_S = 30.0


class Stack:
    """Such a process, and an httpx client of it."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def exchange(self, body: bytes) -> float:
        """Sends a body and receives as many bytes; returns the seconds it took."""
        began = time.perf_counter()
        answer = self._http.post(f"/echo/{len(body)}", content=body)
        seconds = time.perf_counter() - began
        assert len(answer.content) == len(body)
        return seconds


@contextmanager
def stack_alone() -> Iterator[Stack]:
    """A process of its own, on a free port."""
    command = [sys.executable, "-m", "benchmarks.stack"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            with httpx.Client(base_url=process.stdout.readline().strip(), timeout=_TIMEOUT_S) as http:
                yield Stack(http)
        finally:
            process.terminate()


def main() -> None:
    app = FastAPI()
    answers: dict[int, bytes] = {}

    @app.post("/echo/{size}")
    async def echo(size: int, request: Request) -> Response:
        await request.body()
        return Response(answers.setdefault(size, bytes(size)), media_type="application/octet-stream")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, ws="none", log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
