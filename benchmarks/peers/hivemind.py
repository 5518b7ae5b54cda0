"""hivemind: a round of its averager between the worker and a peer that holds the optimizer.

hivemind has no server: peers average gradients, and each applies the average. Here the second peer brings no gradient
of its own (its weight is nought) and does all of the averaging, as a server would; both apply, at the same time, and y
is the worker's own.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import hivemind
import torch
from torch import Tensor

from benchmarks.peers.held import Held
from benchmarks.peers.servers import Server

__all__ = ["Hivemind"]

_MATCHMAKING_S = 0.5
_GIVEN_UP_S = 60.0


class _Member:
    """One of the two peers; `share` is how much of the averaging it does."""

    def __init__(self, parameters: int, addresses: list[str], weight: float, share: float) -> None:
        self.dht = hivemind.DHT(initial_peers=addresses, start=True)
        self._held = Held(parameters)
        self._weight = weight
        self._gradient = torch.empty(parameters)
        self._averager = hivemind.DecentralizedAverager(
            [torch.zeros(parameters)],
            self.dht,
            start=True,
            prefix="gradients",
            target_group_size=2,
            min_matchmaking_time=_MATCHMAKING_S,
            request_timeout=_MATCHMAKING_S / 2,
            bandwidth=share,
            allow_state_sharing=False,
        )

    def round(self, gradient: Tensor | None = None) -> Tensor:
        if gradient is not None:
            with self._averager.get_tensors() as (shared,):
                shared.copy_(gradient)
        while self._averager.step(weight=self._weight, timeout=_GIVEN_UP_S) is None:
            pass
        with self._averager.get_tensors() as (shared,):
            self._gradient.copy_(shared)
        return self._held.step(self._gradient)

    def close(self) -> None:
        self._averager.shutdown()
        self.dht.shutdown()


def _serve(connection: Connection, parameters: int) -> None:
    # hivemind starts processes of its own, from objects that cannot be pickled.
    multiprocessing.set_start_method("fork", force=True)
    member = _Member(parameters, [], weight=0.0, share=1.0)
    connection.send([str(address) for address in member.dht.get_visible_maddrs()])
    while True:
        member.round()


class Hivemind:
    def setup(self, parameters: int) -> None:
        self._server = Server(_serve, parameters)
        self._member = _Member(parameters, self._server.said(), weight=1.0, share=0.0)

    def exchange(self, gradient: Tensor) -> Tensor:
        return self._member.round(gradient)

    def close(self) -> None:
        self._member.close()
        self._server.close()
