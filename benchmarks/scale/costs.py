"""What a push costs a service on its own machines, and where each figure is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log

import torch

from benchmarks.scale.measured import Point
from benchmarks.scale.setup import Costs, Setup
from benchmarks.scale.store_costs import StoreCost, waiting_s
from freestep_service.state.memory_budget import run_bytes

__all__ = [
    "PRICES",
    "RESERVE",
    "SOURCES",
    "fits",
    "gpus_of",
    "gradient_s",
    "host_bytes",
    "on_machines_of_their_own",
    "redis_call_more",
]

_GPU_UPDATE_S = 1.32e-3 / 124e6
_GPU_BYTE_S = 102e-3 / 248e6
_FLOPS, _TOKENS = 4e14, 65_536
_MODEL_GPUS = {1_000_000_000: 1, 10_000_000_000: 8, 100_000_000_000: 64}
GPU_BYTES, HOST_BYTES = 141e9, 512e9
"""Memory of a shard's machine."""
RESERVE = HOST_BYTES / 8
"""Of it, what slow peers may hold: the service's default."""
PRICES = {"GPU hour": 2.0, "shard hour": 3.0, "Redis hour": 0.25}
"""Dollars."""

SOURCES = {
    "event loop, a push": "measured here: fitted on CPU of the services' first threads, without the bytes",
    "event loop, a byte": "docs/speed.md: 248 MB of a push in 102 ms (BF16 to an H200); the same out",
    "update, a parameter": "docs/speed.md: 1.32 ms for 124 million (AdamW Schedule-Free on an H200)",
    "Redis, a push": "its scripts, run as often as by so many shards; and what a call costs more at 4 real shards",
    "a gradient": f"assumed: 6 · parameters · {_TOKENS:,} tokens at {_FLOPS / 1e12:g} TFLOP/s for each GPU; 1 GPU a "
    "worker up to 1 billion parameters, 8 up to 10, 64 above",
    "speeds of workers": "assumed: lognormal, σ 0.2 between workers and 0.1 between gradients",
    "ports of shards": "assumed: 400 Gbit/s each way, a machine for each shard",
    "latency": "assumed: 0.5 ms one way, 20 ms on links of 1 Gbit/s and less",
    "memory": "assumed: a GPU of 141 GB for each shard, in a host of 512 GB; `run_bytes` says what a run needs of that",
    "prices": "assumed: $2 a GPU hour, $3 a shard (GPU and port), $0.25 Redis",
    "failures": "assumed: exponential; a worker is replaced after 60 s; a service is back after 5 s (docs/speed.md)",
}


def gpus_of(parameters: int) -> int:
    """GPUs of a worker."""
    return next(gpus for most, gpus in _MODEL_GPUS.items() if parameters <= most)


def host_bytes(setup: Setup) -> int:
    """The memory that a shard needs of its host, as the service counts it where the state is on a GPU."""
    spec = setup.spec()
    whole = spec.parameters[0].model_copy(update={"shape": (setup.parameters,)})
    return run_bytes(spec.model_copy(update={"parameters": (whole,)}), 1, setup.shards, torch.device("cuda"))


def fits(setup: Setup) -> bool:
    """Whether a shard has the memory that it needs, on the GPU for y, z, v and a push."""
    return 16 * setup.parameters / setup.shards <= GPU_BYTES and host_bytes(setup) <= HOST_BYTES


def gradient_s(parameters: int) -> float:
    """Seconds of a gradient."""
    return 6 * parameters * _TOKENS / (_FLOPS * gpus_of(parameters))


def redis_call_more(points: Sequence[Point], store: Sequence[StoreCost]) -> float:
    """Seconds that a call costs Redis more than its script alone, under real services of several shards."""
    shards = max(point.shards for point in points)
    alone = next(each for each in store if (each.policy, each.shards) == ("ringmaster", shards))
    busy = [point.redis_cpu for point in points if point.shards == shards and 1 < point.workers <= 16]
    return max(0.0, sum(busy) / len(busy) - 1e-3 * alone.ms) / alone.calls


def on_machines_of_their_own(
    shards: int, fitted: Mapping[int, Costs], store: Sequence[StoreCost], call_more: float
) -> Costs:
    """The costs of a service of so many shards, each on a machine of its own with a GPU.

    fitted: on the measuring machine. call_more: see `redis_call_more`. Between numbers of shards that were tried, the
    cost of Redis is a power of the number.
    """
    few = [each for each in store if each.policy == "ringmaster" and each.workers <= 10 and not each.waiting]
    tried = sorted((each.shards, each.ms) for each in few)
    below = max((each for each in tried if each[0] <= shards), default=tried[0])
    above = min((each for each in tried if each[0] >= shards), default=tried[-1])
    ms = below[1]
    if above[0] != below[0]:
        power = log(above[1] / below[1]) / log(above[0] / below[0])
        ms = exp(log(below[1]) + power * log(shards / below[0]))
    return Costs(
        loop_push=fitted[min(fitted) if shards == 1 else max(fitted)].loop_push,
        loop_byte=_GPU_BYTE_S,
        update_parameter=_GPU_UPDATE_S,
        redis_push=1e-3 * ms + 2 * shards * call_more,
        redis_waiting=waiting_s(store) if shards > 1 else 0.0,
    )
