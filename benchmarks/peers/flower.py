"""Flower: a round of its server, whose strategy applies the gradient that the one client's `fit` returns.

A round is what Flower has: its server configures the client with y, the client fits, and the server aggregates. An
exchange is measured from the gradient's being there to the next call of `fit`, which brings y.
"""

from __future__ import annotations

import socket
import threading
import time
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from flwr.client import NumPyClient, start_client
from flwr.common import FitIns, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg
from torch import Tensor

from benchmarks.peers.held import Held
from benchmarks.peers.servers import Server, free_port

__all__ = ["Flower"]

_ENDLESS = 1_000_000


class _Strategy(FedAvg):  # type: ignore[misc]
    def __init__(self, parameters: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_fit_clients=1, min_available_clients=1)
        self._held = Held(parameters)

    def initialize_parameters(self, client_manager: Any) -> Parameters:
        return ndarrays_to_parameters([self._held.y.numpy()])

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        client_manager.wait_for(1)
        return [(client, FitIns(parameters, {})) for client in client_manager.sample(1)]

    def aggregate_fit(
        self, server_round: int, results: list[Any], failures: list[Any]
    ) -> tuple[Parameters, dict[str, Any]]:
        [(_, answer)] = results
        [gradient] = parameters_to_ndarrays(answer.parameters)
        return ndarrays_to_parameters([self._held.step(torch.from_numpy(gradient)).numpy()]), {}

    def configure_evaluate(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        return []

    def evaluate(self, server_round: int, parameters: Parameters) -> None:
        return None


def _serve(connection: Connection, parameters: int, address: str) -> None:
    start_server(server_address=address, config=ServerConfig(num_rounds=_ENDLESS), strategy=_Strategy(parameters))


class _Client(NumPyClient):  # type: ignore[misc]
    """Hands each round's y to one queue, and takes the gradient to answer with from another."""

    def __init__(self) -> None:
        self.ys: SimpleQueue[np.ndarray] = SimpleQueue()
        self.gradients: SimpleQueue[np.ndarray] = SimpleQueue()

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        self.ys.put(parameters[0])
        return [self.gradients.get()], 1, {}


class Flower:
    def setup(self, parameters: int) -> None:
        port = free_port()
        self._server = Server(_serve, parameters, f"127.0.0.1:{port}")
        self._client = _Client()
        # A client that finds no server says so and ends.
        while not _listens(port):
            time.sleep(0.1)
        connect = {"server_address": f"127.0.0.1:{port}", "client": self._client.to_client()}
        threading.Thread(target=start_client, kwargs=connect, daemon=True).start()
        self._client.ys.get()

    def exchange(self, gradient: Tensor) -> Tensor:
        self._client.gradients.put(gradient.numpy())
        return torch.from_numpy(self._client.ys.get())

    def close(self) -> None:
        self._server.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
