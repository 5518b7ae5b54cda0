"""A Ray actor; arrays travel through the object store, which is shared memory on one host."""

from __future__ import annotations

import numpy as np
import ray
import torch
from torch import Tensor

from benchmarks.peers.held import Held

__all__ = ["RayActor"]


class _Parameters:
    def __init__(self, parameters: int) -> None:
        self._held = Held(parameters)
        self._gradient = torch.empty(parameters)

    def step(self, gradient: np.ndarray) -> np.ndarray:
        # What lies in the object store is not to be written to, and the optimizer overwrites its gradient.
        np.copyto(self._gradient.numpy(), gradient)
        return self._held.step(self._gradient).numpy()


class RayActor:
    def setup(self, parameters: int) -> None:
        ray.init(include_dashboard=False, log_to_driver=False, object_store_memory=max(40 * parameters, 200_000_000))
        self._actor = ray.remote(_Parameters).remote(parameters)

    def exchange(self, gradient: Tensor) -> Tensor:
        # Without a copy: it lies in the object store, and torch warns that it is read-only.
        return torch.from_numpy(ray.get(self._actor.step.remote(gradient.numpy())))

    def close(self) -> None:
        ray.shutdown()
