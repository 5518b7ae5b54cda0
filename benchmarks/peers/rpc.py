"""torch RPC, by TCP or by shared memory as its TensorPipe backend is told."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection

from torch import Tensor
from torch.distributed import rpc

from benchmarks.peers.held import Held
from benchmarks.peers.servers import Server, free_port

__all__ = ["SharedRpc", "TcpRpc"]

_held: Held
"""In the server's process."""


def _step(gradient: Tensor) -> Tensor:
    return _held.step(gradient)


def _join(name: str, rank: int, port: int, ways: tuple[list[str], list[str]]) -> None:
    transports, channels = ways
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://127.0.0.1:{port}", _transports=transports, _channels=channels
    )
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)  # type: ignore[no-untyped-call]


def _serve(connection: Connection, parameters: int, port: int, ways: tuple[list[str], list[str]]) -> None:
    global _held
    _held = Held(parameters)
    _join("server", 1, port, ways)
    threading.Event().wait()


class _Rpc:
    ways: tuple[list[str], list[str]]
    """TensorPipe's transports, for messages, and channels, for tensors."""

    def setup(self, parameters: int) -> None:
        port = free_port()
        self._server = Server(_serve, parameters, port, self.ways)
        _join("worker", 0, port, self.ways)

    def exchange(self, gradient: Tensor) -> Tensor:
        y: Tensor = rpc.rpc_sync("server", _step, (gradient,))
        return y

    def close(self) -> None:
        self._server.close()


class TcpRpc(_Rpc):
    ways = ["uv"], ["basic"]


class SharedRpc(_Rpc):
    ways = ["shm", "uv"], ["cma", "basic"]
