"""Ingest alone: a process that receives the bodies of pushes as the service does, into memory of the same kind, digests
them, and does nothing else with them. `python -m benchmarks.ingest PARAMETERS DEVICE` is that process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from benchmarks.apart import apart, serve
from freestep import Flat
from freestep.api.models import ParameterSpec
from freestep.bulk import BulkTransport
from freestep.bulk_exchange import Body as Outgoing
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver
from freestep_service.state.buffers import Vector
from freestep_service.web.body import Body
from freestep_service.web.connection import Connection

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
    with (
        apart("benchmarks.ingest", str(parameters), device) as url,
        httpx.Client(transport=BulkTransport(), timeout=_STALL_S) as http,
    ):
        yield Ingest(url, http)


def main() -> None:
    parameters, device = int(sys.argv[1]), torch.device(sys.argv[2])
    manifest = Manifest([ParameterSpec(name="w", shape=(parameters,))])
    vector = Vector(manifest.numel, device=device)
    vector.pin()

    async def receive(request: Request) -> PlainTextResponse:
        length = int(request.headers["content-length"])
        receiver = Receiver(manifest, vector.bytes, length)
        return PlainTextResponse(await Body(request, length, _STALL_S).receive_into(receiver))

    serve(Starlette(routes=[Route("/", receive, methods=["POST"])]), http=Connection)


if __name__ == "__main__":
    main()
