"""freestep itself, as its users have it: a `RemoteOptimizer` with everything by default, at a service beside it."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from benchmarks.services import running_service
from freestep import Client, RemoteOptimizer

__all__ = ["SharedFreestep", "TcpFreestep"]


class _Freestep:
    shares_memory: bool

    def setup(self, parameters: int) -> None:
        self._parameter = nn.Parameter(torch.zeros(parameters))
        with ExitStack() as stack:
            service = stack.enter_context(running_service(shared_memory=str(self.shares_memory)))
            client = stack.enter_context(Client(service.url, shared_memory=self.shares_memory))
            self._optimizer = RemoteOptimizer([("w", self._parameter)], client=client, run="rivals")
            stack.callback(self._optimizer.close)
            self._opened = stack.pop_all()

    def exchange(self, gradient: Tensor) -> Tensor:
        self._parameter.grad = gradient
        self._optimizer.step()
        return self._parameter.detach()

    def close(self) -> None:
        self._opened.close()


class TcpFreestep(_Freestep):
    shares_memory = False


class SharedFreestep(_Freestep):
    shares_memory = True
