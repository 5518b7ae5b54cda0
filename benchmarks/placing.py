"""Runs whose shards are in as many processes as there are for them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.services import Service
from benchmarks.worker import spec
from freestep import Flat, Run

__all__ = ["place"]

_SETTLED_S = 0.02


def place(run: Run, services: Sequence[Service], parameters: int, shards: int) -> None:
    """Creates a run that starts from zeros, with its shards spread over the services.

    Processes that have not heard of each other yet take more than their share; then the run is created again.
    """
    while True:
        run.create(spec(parameters, shards=shards))
        while (topology := run.topology()).missing:
            time.sleep(_SETTLED_S)
        owners = {shard.url for shard in topology.shards if shard.url is not None}
        if len(owners) == min(shards, len(services)):
            run.initialize(Flat(run.manifest))
            return
        run.delete()
        time.sleep(1)
