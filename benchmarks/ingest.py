"""Ingest alone: a process that receives the bodies of pushes as the service does, into memory of the same kind, digests
them, and does nothing else with them. `python -m benchmarks.ingest PARAMETERS DEVICE` is that process."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from freestep import Flat
from freestep.bulk import Body as Outgoing
from freestep.bulk import BulkTransport
from freestep.manifest import Manifest
from freestep.models import ParameterSpec
from freestep.wire import Receiver
from freestep_service.connection import Connection
from freestep_service.ingest import Body
from freestep_service.vectors import Vector

__all__ = ["Ingest", "ingest_alone"]

_STALL_S = 30.0


class Ingest:
    """Such a process, to which bodies can be sent."""

    def __init__(self, url: str, http: httpx.Client) -> None:
        self._url = url
        self._http = http

    def once(self, gradient: Flat) -> None:
        """Sends a body, and returns when all of it has been received."""
        body = Outgoing(gradient.body())
        request = self._http.build_request("POST", self._url, headers={"Content-Length": str(body.length)})
        request.stream = body
        self._http.send(request).raise_for_status()


@contextmanager
def ingest_alone(parameters: int, device: str) -> Iterator[Ingest]:
    """A process that receives bodies of one tensor of so many parameters, which a device could then copy."""
    command = [sys.executable, "-m", "benchmarks.ingest", str(parameters), device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            with httpx.Client(transport=BulkTransport(), timeout=_STALL_S) as http:
                yield Ingest(process.stdout.readline().strip(), http)
        finally:
            process.terminate()


def main() -> None:
    parameters, device = int(sys.argv[1]), torch.device(sys.argv[2])
    manifest = Manifest([ParameterSpec(name="w", shape=(parameters,))])
    vector = Vector(manifest.numel, device=device)
    vector.pin()

    async def receive(request: Request) -> PlainTextResponse:
        length = int(request.headers["content-length"])
        receiver = Receiver(manifest, vector.bytes, length)
        return PlainTextResponse(await Body(request, length, _STALL_S).receive_into(receiver))

    app = Starlette(routes=[Route("/", receive, methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
        config = uvicorn.Config(app, http=Connection, ws="none", log_level="warning")
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
