"""What a push costs a service on its own machines, and where each figure is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from benchmarks.scale.machines import MOST_PIECES, PIECE_S
from benchmarks.scale.measured import SHARDS, SIZES, Point
from benchmarks.scale.setup import Costs, Failures, Setup
from benchmarks.scale.simulation import ANSWER, ASKING, CLAIM, COMMIT, GATHERED
from benchmarks.scale.store_costs import WAITING_SHARDS, StoreCost, over_shards, waiting_s
from freestep_service.state.memory_budget import run_bytes

__all__ = [
    "FAR_LINK",
    "FAR_S",
    "JITTER_SIGMA",
    "NEAR_S",
    "PORT",
    "PRICES",
    "RESERVE",
    "SPEED_SIGMA",
    "STARTING_S",
    "fits",
    "gpus_of",
    "gradient_s",
    "host_bytes",
    "on_machines_of_their_own",
    "redis_call_more",
    "sources",
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
PORT = 50e9
"""Of a shard's machine each way, in bytes a second."""
NEAR_S, FAR_S, FAR_LINK = 0.0005, 0.02, 125e6
"""Latency one way; and the rate of the links, in bytes a second, up to which it is the far one."""
SPEED_SIGMA, JITTER_SIGMA = 0.2, 0.1
STARTING_S = 30.0
"""Until a new pod pushes."""


def sources() -> dict[str, str]:
    """Where each figure is from, by what it is of."""
    workers = "; ".join(
        f"{gpus} GPU{'s' if gpus > 1 else ''} a worker up to {parameters // 10**9} billion parameters"
        for parameters, gpus in _MODEL_GPUS.items()
    )
    failures = Failures()
    return {
        "event loop, a push": "measured here: fitted on CPU of the services' first threads, without the bytes",
        "event loop, a byte": "docs/speed.md: 248 MB of a push in 102 ms (BF16 to an H200); the same out",
        "update, a parameter": "docs/speed.md: 1.32 ms for 124 million (AdamW Schedule-Free on an H200)",
        "Redis, a push": "its scripts, run as often as by so many shards; and what a call costs more at "
        f"{max(SHARDS)} real shards",
        "Redis, each that waits": f"its scripts, of {' and '.join(map(str, WAITING_SHARDS))} shards; between these a "
        "power of their number",
        "when a push is at the event loop": f"assumed: {CLAIM:.0%} before its body, {COMMIT:.0%} at its decision, "
        f"{ANSWER:.0%} at its answer; {ASKING:.0%} more each time that it asks for its turn; bodies in pieces of "
        f"{1e3 * PIECE_S:g} ms, at most {MOST_PIECES}",
        "a push of a group": f"assumed: {GATHERED:.0%} of an update, by the bytes that it passes over",
        "a gradient": f"assumed: 6 · parameters · {_TOKENS:,} tokens at {_FLOPS / 1e12:g} TFLOP/s for each GPU; "
        f"{workers}",
        "speeds of workers": f"assumed: lognormal, σ {SPEED_SIGMA:g} between workers (of groups, too) and "
        f"{JITTER_SIGMA:g} between gradients",
        "ports of shards": f"assumed: {8 * PORT / 1e9:g} Gbit/s each way, a machine for each shard",
        "latency": f"assumed: {1e3 * NEAR_S:g} ms one way, {1e3 * FAR_S:g} ms on links of "
        f"{8 * FAR_LINK / 1e9:g} Gbit/s and less",
        "memory": f"assumed: a GPU of {GPU_BYTES / 1e9:g} GB for each shard, in a host of {HOST_BYTES / 1e9:g} GB; "
        "`run_bytes` says what a run needs of that",
        "prices": f"assumed: ${PRICES['GPU hour']:g} a GPU hour, ${PRICES['shard hour']:g} a shard (GPU and port), "
        f"${PRICES['Redis hour']:g} Redis; none for traffic",
        "failures": f"assumed: exponential; a worker is replaced after {failures.worker_restart_s:g} s; a service is "
        f"back after {failures.recovery_s:g} s (docs/speed.md)",
        "scaling": f"assumed: a new pod pushes after {STARTING_S:g} s",
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
    mine = [point for point in points if point.shards == shards and point.parameters in SIZES]
    busy = [point.redis_cpu for point in mine if 1 < point.workers <= 16]
    return max(0.0, sum(busy) / len(busy) - 1e-3 * alone.ms) / alone.calls


def on_machines_of_their_own(
    shards: int, fitted: Mapping[int, Costs], store: Sequence[StoreCost], call_more: float
) -> Costs:
    """The costs of a service of so many shards, each on a machine of its own with a GPU.

    fitted: on the measuring machine. call_more: see `redis_call_more`.
    """
    few = [each for each in store if each.policy == "ringmaster" and each.workers <= 10 and not each.waiting]
    ms = over_shards({each.shards: each.ms for each in few}, shards)
    mine = fitted[min(fitted) if shards == 1 else max(fitted)]
    return Costs(
        loop_push=mine.loop_push + mine.loop_hand_over,
        loop_byte=_GPU_BYTE_S,
        update_parameter=_GPU_UPDATE_S,
        redis_push=1e-3 * ms + 2 * shards * call_more,
        redis_waiting=waiting_s(store, shards),
    )
