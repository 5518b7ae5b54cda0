"""gRPC, one unary call for an exchange; its messages are the vectors' bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import grpc
import torch
from torch import Tensor

from benchmarks.peers.held import Held
from benchmarks.peers.servers import Server

__all__ = ["Grpc"]

_UNBOUNDED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def _serve(connection: Connection, parameters: int) -> None:
    held = Held(parameters)

    def step(message: bytes, context: grpc.ServicerContext) -> bytes:
        # A copy, since the optimizer overwrites its gradient and bytes are immutable.
        return held.step(torch.frombuffer(bytearray(message), dtype=torch.float32)).numpy().tobytes()

    server = grpc.server(ThreadPoolExecutor(1), options=_UNBOUNDED)
    methods = {"Step": grpc.unary_unary_rpc_method_handler(step)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Parameters", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection.send(port)
    server.wait_for_termination()


class Grpc:
    def setup(self, parameters: int) -> None:
        self._server = Server(_serve, parameters)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self._server.said()}", options=_UNBOUNDED)
        self._step = self._channel.unary_unary("/Parameters/Step")

    def exchange(self, gradient: Tensor) -> Tensor:
        return torch.frombuffer(self._step(gradient.numpy().tobytes()), dtype=torch.float32)

    def close(self) -> None:
        self._channel.close()
        self._server.close()
