"""The parts of the distances between pushes that the shards of a run report, and their sum."""

from __future__ import annotations

import base64

import numpy as np
import torch
from torch import Tensor

__all__ = ["part_of", "summed"]


def part_of(distances: Tensor) -> str:
    """A shard's part, fp64 [pairs], as a word of ASCII."""
    return base64.urlsafe_b64encode(distances.numpy().astype("<f8").tobytes()).decode()


def summed(parts: str) -> Tensor:
    """The sum of all shards' parts, fp64 [pairs]; parts: words with a space between each two.

    They are added in the order of the shards, whoever reported first, so that all shards and all repetitions of a run
    have the same bits.
    """
    total, *others = (np.frombuffer(base64.urlsafe_b64decode(part), "<f8") for part in parts.split(" "))
    for other in others:
        total = total + other
    return torch.from_numpy(total.astype(np.float64))
