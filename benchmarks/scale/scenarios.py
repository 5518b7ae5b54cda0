"""The simulations that docs/scale.md shows: regimes and what helps in them, sweeps, failures, scaled workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil, inf
from typing import Any

from benchmarks.scale.autoscaling import Targets, scaled
from benchmarks.scale.bottlenecks import REMEDIES, Remedy, bottleneck
from benchmarks.scale.costs import (
    FAR_LINK,
    FAR_S,
    JITTER_SIGMA,
    NEAR_S,
    PORT,
    PRICES,
    SPEED_SIGMA,
    fits,
    gpus_of,
    gradient_s,
    host_bytes,
)
from benchmarks.scale.outcome import Outcome
from benchmarks.scale.rules import Desk
from benchmarks.scale.setup import Costs, Failures, Setup
from benchmarks.scale.simulation import simulate

__all__ = ["LINKS", "failures", "growth", "links", "measure", "over_shards", "regimes", "scaling"]

LINKS = {
    "100 Mbit/s": 12.5e6,
    "1 Gbit/s": 125e6,
    "10 Gbit/s": 1.25e9,
    "100 Gbit/s": 12.5e9,
    "400 Gbit/s": 50e9,
}
_SEED = 1

CostsOf = Callable[[int], Costs]
"""The costs of a service of so many shards."""


@dataclass(frozen=True)
class _Regime:
    """A model of so many parameters, workers and shards, on a link."""

    parameters: int
    workers: int
    shards: int
    link: str
    bytes: float = 2.0
    """A parameter, each way: BF16."""


_REGIMES = (
    _Regime(10_000_000, 10, 1, "100 Mbit/s"),
    _Regime(10_000_000, 1000, 1, "1 Gbit/s"),
    _Regime(10_000_000, 10_000, 1, "10 Gbit/s"),
    _Regime(100_000_000, 100, 1, "1 Gbit/s"),
    _Regime(100_000_000, 1000, 4, "10 Gbit/s"),
    _Regime(1_000_000_000, 10, 1, "1 Gbit/s"),
    _Regime(1_000_000_000, 100, 4, "100 Gbit/s"),
    _Regime(7_000_000_000, 16, 8, "100 Gbit/s"),
    _Regime(7_000_000_000, 64, 256, "400 Gbit/s"),
    _Regime(70_000_000_000, 16, 64, "400 Gbit/s"),
    _Regime(70_000_000_000, 100, 256, "400 Gbit/s"),
)


def measure(costs_of: CostsOf, desk: Desk, quick: bool) -> dict[str, Any]:
    """All of them, as JSON's types."""
    return {
        "regimes": regimes(costs_of, desk, quick),
        "growth": growth(costs_of, desk, quick),
        "shards": over_shards(costs_of, desk, quick),
        "links": links(costs_of, desk, quick),
        "policies": policies(costs_of, desk, quick),
        "failures": failures(costs_of, desk, quick),
        "scaling": scaling(costs_of, desk, quick),
    }


def _setup(costs_of: CostsOf, regime: _Regime) -> Setup:
    link = LINKS[regime.link]
    return Setup(
        regime.parameters,
        regime.workers,
        costs_of(regime.shards),
        shards=regime.shards,
        compute_s=gradient_s(regime.parameters),
        link=link,
        port=PORT,
        latency_s=FAR_S if link <= FAR_LINK else NEAR_S,
        pushed_bytes=regime.bytes,
        pulled_bytes=regime.bytes,
        speed_sigma=SPEED_SIGMA,
        jitter_sigma=JITTER_SIGMA,
        seed=_SEED,
    )


def _simulated(setup: Setup, desk: Desk, least: int = 300) -> Outcome:
    """Begins to count when every worker has made a push, so that staleness has come to what it stays at."""
    outcome = simulate(setup, desk, max(least, setup.workers // 5), warmup=max(least, 1.2 * setup.workers))
    desk.clear()
    return outcome


def _cents_per_1000(effective_per_s: float, gpus: int, shards: int, stores: int) -> float | None:
    """Of gradients that count, for the machines; None where none does."""
    dollars = gpus * PRICES["GPU hour"] + shards * PRICES["shard hour"] + stores * PRICES["Redis hour"]
    return 1e5 * dollars / 3600 / effective_per_s if effective_per_s else None


def _shown(setup: Setup, outcome: Outcome) -> dict[str, Any]:
    """What tables and plots show of an outcome."""
    ideal = setup.workers / setup.compute_s
    gpus = setup.workers * gpus_of(setup.parameters)
    return {
        "parameters": setup.parameters,
        "workers": setup.workers,
        "shards": setup.shards,
        "pushes_per_s": outcome.pushes_per_s,
        "effective_per_s": outcome.effective_per_s,
        "of_ideal": outcome.effective_per_s / ideal,
        "staleness": outcome.staleness,
        "expected_staleness": outcome.expected_staleness,
        "dropped": outcome.dropped / max(outcome.sent, 1),
        "computing": outcome.computing,
        "bottleneck": bottleneck(outcome),
        "gb_a_shard": host_bytes(setup) / 1e9,
        "cents_per_1000": _cents_per_1000(outcome.effective_per_s, gpus, setup.shards, 1),
        "use": outcome.use,
        "waits": outcome.waits,
    }


def _with(remedy: Remedy, regime: _Regime, costs_of: CostsOf, desk: Desk) -> dict[str, Any]:
    """What a regime comes to with a remedy."""
    # More shards have costs of their own.
    setup = replace(remedy, more_shards=1).applied_to(
        _setup(costs_of, replace(regime, shards=regime.shards * remedy.more_shards))
    )
    if remedy.group == 1:
        return _shown(setup, _simulated(setup, desk))
    # The workers of a group push to their own service, near by; that pushes each time they have made their local steps.
    size = min(remedy.group, regime.workers)
    near = LINKS["100 Gbit/s"]
    inner_shards = max(1, min(16, regime.parameters // 1_000_000_000))
    inner = replace(
        _setup(costs_of, regime),
        workers=size,
        shards=inner_shards,
        costs=costs_of(inner_shards),
        link=max(near, LINKS[regime.link]),
        latency_s=NEAR_S,
    )
    made = _simulated(inner, desk)
    steps = remedy.local_steps * size
    outer = replace(
        setup, workers=ceil(regime.workers / size), local_steps=steps, compute_s=1 / made.effective_per_s, units=0
    )
    shown = _shown(outer, _simulated(outer, desk, least=100))
    ideal = regime.workers / gradient_s(regime.parameters)
    cents = _cents_per_1000(
        shown["effective_per_s"],
        regime.workers * gpus_of(regime.parameters),
        setup.shards + outer.workers * inner_shards,
        1 + outer.workers,
    )
    of_all = {"workers": regime.workers, "of_ideal": shown["effective_per_s"] / ideal, "cents_per_1000": cents}
    return shown | of_all | {"inner": bottleneck(made)}


def regimes(costs_of: CostsOf, desk: Desk, quick: bool) -> list[dict[str, Any]]:
    """Each regime as it is, and with what helps against its first bottleneck."""
    found = []
    for regime in _REGIMES[:1] if quick else _REGIMES:
        setup = _setup(costs_of, regime)
        plain = _shown(setup, _simulated(setup, desk))
        helped = {
            remedy.name: _with(remedy, regime, costs_of, desk)
            for remedy in REMEDIES
            if remedy.helps(plain["bottleneck"], setup) and regime.shards * remedy.more_shards <= 256
        }
        found.append({**asdict(regime), "plain": plain, "helped": helped})
    return found


def growth(costs_of: CostsOf, desk: Desk, quick: bool) -> list[dict[str, Any]]:
    """10 to 10,000 workers of a model, on links of 10 Gbit/s, with and without local steps."""
    found = []
    for parameters, local_steps in ((10_000_000, 1), (10_000_000, 50), (100_000_000, 50)):
        for workers in (10, 100) if quick else (10, 100, 1000, 10_000):
            setup = replace(_setup(costs_of, _Regime(parameters, workers, 1, "10 Gbit/s")), local_steps=local_steps)
            found.append({"local_steps": local_steps, **_shown(setup, _simulated(setup, desk))})
    return found


def over_shards(costs_of: CostsOf, desk: Desk, quick: bool) -> list[dict[str, Any]]:
    """1 to 256 shards of large models, for workers with fast links."""
    found = []
    for parameters, workers in ((1_000_000_000, 64), (7_000_000_000, 64), (70_000_000_000, 64)):
        for shards in (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256):
            setup = _setup(costs_of, _Regime(parameters, workers, shards, "400 Gbit/s"))
            if not fits(setup):
                continue
            found.append(_shown(setup, _simulated(setup, desk)))
    return found


_WAYS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"pushed_bytes": 4.0, "pulled_bytes": 4.0},
    "BF16 both ways": {},
    "int8 both ways": {"pushed_bytes": 1 + 4 / 256, "pulled_bytes": 1 + 4 / 256},
    "BF16, 50 local steps": {"local_steps": 50},
    "int8, 50 local steps": {"pushed_bytes": 1 + 4 / 256, "pulled_bytes": 1 + 4 / 256, "local_steps": 50},
}


def links(costs_of: CostsOf, desk: Desk, quick: bool) -> list[dict[str, Any]]:
    """100 Mbit/s to 400 Gbit/s, for 32 workers of 100 million and of a billion parameters."""
    found = []
    for parameters in (100_000_000, 1_000_000_000):
        for way, options in _WAYS.items():
            for link in list(LINKS)[2:3] if quick else LINKS:
                setup = replace(_setup(costs_of, _Regime(parameters, 32, 1, link)), **options)
                found.append({"way": way, "link": link, **_shown(setup, _simulated(setup, desk, least=100))})
    return found


def policies(costs_of: CostsOf, desk: Desk, quick: bool) -> list[dict[str, Any]]:
    """32 workers of speeds that differ, under each policy."""
    found = []
    chosen: list[dict[str, Any]] = [
        {"policy": "ringmaster"},
        {"policy": "async", "staleness_damping": "delay_adaptive"},
        {"policy": "async", "staleness_damping": "inverse_sqrt"},
        {"policy": "buffered", "batch": 8},
        {"policy": "ssp", "slack": 4},
        {"policy": "rennala", "batch": 8},
        {"policy": "quorum", "batch": 24},
        {"policy": "sync"},
    ]
    for aggregation in chosen[:2] if quick else chosen:
        regime = _Regime(100_000_000, 32, 1, "100 Gbit/s")
        # Four to one between the fastest and the slowest of most.
        setup = replace(_setup(costs_of, regime), aggregation=aggregation, speed_sigma=0.5, compute_s=2.0)
        found.append({"aggregation": aggregation, **_shown(setup, _simulated(setup, desk, least=800))})
    return found


def failures(costs_of: CostsOf, desk: Desk, quick: bool) -> list[dict[str, Any]]:
    """32 workers and 4 shards that fail, over an hour, by durability; every push has a unit of a data set."""
    found = []
    for mtbf_s in (600.0,) if quick else (600.0, 3600.0, 6 * 3600.0):
        for durability, checkpoint_s in (("checkpoint", 30.0), ("checkpoint", 300.0), ("journal", 300.0)):
            setup = replace(
                _setup(costs_of, _Regime(100_000_000, 32, 4, "10 Gbit/s")),
                compute_s=20.0,
                durability=durability,
                failures=Failures(worker_mtbf_s=mtbf_s, shard_mtbf_s=mtbf_s, checkpoint_s=checkpoint_s),
                units=10_000_000,
            )
            outcome = simulate(setup, desk, inf, until_s=300.0 if quick else 3600.0)
            desk.clear()
            found.append(
                {
                    "mtbf_s": mtbf_s,
                    "durability": durability,
                    "checkpoint_s": checkpoint_s,
                    "computed": outcome.sent,
                    "lost": outcome.lost,
                    "undone": outcome.undone,
                    "goodput": outcome.goodput,
                    "of_ideal": outcome.effective_per_s / (setup.workers / setup.compute_s),
                    "units_done": outcome.units_done,
                    "counted": outcome.applied + outcome.accumulated - outcome.undone,
                }
            )
    return found


_DEFAULT = "by the chart's rule, its defaults"
_SCALED: Mapping[str, Targets | int] = {
    "8 workers": 8,
    "32 workers": 32,
    "128 workers": 128,
    _DEFAULT: Targets(most=128),
    "by the chart's rule, targetStaleness 64": Targets(most=128, staleness=64.0),
}


def scaling(costs_of: CostsOf, desk: Desk, quick: bool) -> list[dict[str, Any]]:
    """Workers by the chart's rule beside fixed numbers, through a data set of which each push has a unit."""
    found = []
    for name, chosen in _SCALED.items():
        start = chosen if isinstance(chosen, int) else 1
        setup = replace(
            _setup(costs_of, _Regime(100_000_000, start, 1, "10 Gbit/s", 4.0)),
            compute_s=5.0,
            units=500 if quick else 6000,
        )
        made = scaled(setup, desk, 4 * 3600.0, None if isinstance(chosen, int) else chosen)
        desk.clear()
        counted = made.outcome.applied
        found.append(
            {
                "name": name,
                "seconds": made.seconds,
                "most": max(look.workers for look in made.looks),
                "mean": made.worker_s / made.seconds,
                "staleness": made.outcome.staleness,
                "wait_s": made.outcome.waits["all"],
                "worker_s_per_gradient": made.worker_s / counted,
                "units_done": made.outcome.units_done,
                "looks": [asdict(look) for look in made.looks],
            }
        )
    return found
