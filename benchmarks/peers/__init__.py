"""Other ways to do what a push + pull does, each behind one small seam.

A peer's worker sends a fp32 gradient, its server has the schedulefree package's AdamW applied to the parameters that
it holds, and the worker receives y. Peers need torch, schedulefree and their own packages, and nothing of freestep, so
that they run in an environment of their own where their requirements are not freestep's: see benchmarks/peers.txt.
freestep is measured through the same seam.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import Tensor

__all__ = ["OURS", "PEERS", "Entry", "Peer"]


class Peer(Protocol):
    """The worker of a peer, and by it the server, which is another process."""

    def setup(self, parameters: int) -> None:
        """Starts a server that holds so many parameters, and connects to it."""

    def exchange(self, gradient: Tensor) -> Tensor:
        """Sends a gradient, has it applied, and returns fresh y. The gradient is not changed."""

    def close(self) -> None:
        """Ends the server."""


@dataclass(frozen=True)
class Entry:
    """A peer, and the packages that it needs beside torch and schedulefree."""

    title: str
    needs: tuple[str, ...]
    module: str
    name: str

    def make(self) -> Peer:
        peer: Peer = getattr(import_module(self.module), self.name)()
        return peer


OURS = {
    "tcp": Entry("freestep, TCP", ("freestep",), "benchmarks.peers.freestep", "TcpFreestep"),
    "shm": Entry("freestep, shared memory", ("freestep",), "benchmarks.peers.freestep", "SharedFreestep"),
}
"""freestep's two ways; it takes the second by itself where there is one, for bodies that gain by it."""
PEERS = {
    "torchft": Entry("torchft ParameterServer, Gloo", ("torchft",), "benchmarks.peers.torchft", "Torchft"),
    "rpc-tcp": Entry("torch RPC, TCP", (), "benchmarks.peers.rpc", "TcpRpc"),
    "ray": Entry("Ray actor, shared memory", ("ray",), "benchmarks.peers.ray", "RayActor"),
    "rpc-shm": Entry("torch RPC, shared memory", (), "benchmarks.peers.rpc", "SharedRpc"),
    "grpc": Entry("gRPC unary, TCP", ("grpc",), "benchmarks.peers.grpc", "Grpc"),
    "flower": Entry("Flower, a round", ("flwr",), "benchmarks.peers.flower", "Flower"),
    "hivemind": Entry("hivemind, a round", ("hivemind",), "benchmarks.peers.hivemind", "Hivemind"),
}
"""By their short names. A round is more than an exchange: those who take part are found and told anew each time."""
