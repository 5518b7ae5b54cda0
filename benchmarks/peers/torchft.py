"""torchft's ParameterServer, whose sessions are Gloo process groups."""

from __future__ import annotations

import threading
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torchft.parameter_server import ParameterServer
from torchft.process_group import ProcessGroup, ProcessGroupGloo

from benchmarks.peers.held import Held
from benchmarks.peers.servers import Server

__all__ = ["Torchft"]

_SERVER, _WORKER = 0, 1
"""Ranks, which are torchft's choice."""


class _Parameters(ParameterServer):  # type: ignore[misc]
    def __init__(self, parameters: int) -> None:
        self._held = Held(parameters)
        self._gradient = torch.empty(parameters)
        super().__init__(port=0)

    @classmethod
    def new_process_group(cls) -> ProcessGroup:
        return ProcessGroupGloo(timeout=timedelta(seconds=60))

    def forward(self, session_id: str, pg: ProcessGroup) -> None:
        while True:
            pg.recv([self._gradient], _WORKER, 0).wait()
            pg.send([self._held.step(self._gradient)], _WORKER, 0).wait()


def _serve(connection: Connection, parameters: int) -> None:
    connection.send(_Parameters(parameters).address())
    threading.Event().wait()


class Torchft:
    def setup(self, parameters: int) -> None:
        self._server = Server(_serve, parameters)
        self._group = _Parameters.new_session(self._server.said())
        self._y = torch.empty(parameters)

    def exchange(self, gradient: Tensor) -> Tensor:
        self._group.send([gradient], _SERVER, 0).wait()
        self._group.recv([self._y], _SERVER, 0).wait()
        return self._y

    def close(self) -> None:
        self._server.close()
