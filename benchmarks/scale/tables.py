"""The tables of docs/scale.md, by the name of the marker that each stands at."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.scale.costs import sources
from benchmarks.scale.measured import SHARDS
from benchmarks.scale.validation import WITHIN
from examples.lab.figures import Table, digits

__all__ = ["tables"]

_OUTCOME = ("gradients a second", "of what workers can", "staleness", "cents for 1,000")


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by marker."""
    simulated = found["simulated"]
    return {
        "machine": _machine(found),
        "measured": _measured(found),
        "fitted": _fitted(found),
        "busy": _busy(found),
        "compared": _compared(found),
        "compared-summary": _summary(found),
        "store": _store(found),
        "costs": _costs(found),
        "regimes": _regimes(simulated["regimes"]),
        "remedies": _remedies(simulated["regimes"]),
        "growth": _growth(simulated["growth"]),
        "shards": _shards(simulated["shards"]),
        "policies": _policies(simulated["policies"]),
        "failures": _failures(simulated["failures"]),
        "scaling": _scaling(simulated["scaling"]),
    }


def _table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    return Table(title, heads, rows).markdown()


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:g}B" if parameters >= 1e9 else f"{parameters / 1e6:g}M"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _machine(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    return (
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gb']} GB, Linux {machine['kernel']}, "
        f"Python {machine['python']}; the load before it was {machine['load_before']:.2f}."
    )


def _fitted(found: Mapping[str, Any]) -> str:
    names = {
        "loop_push": ("event loop, a shard's part of a push", 1e6),
        "loop_hand_over": ("... that is updated by another thread", 1e6),
        "loop_waiting": ("... for each push that waits", 1e6),
        "loop_wake": ("event loop, each time that it was idle", 1e6),
        "loop_byte": ("event loop, 1,000 bytes", 1e9),
        "update_parameter": ("update, 1,000 parameters", 1e9),
        "redis_push": ("Redis, a push", 1e6),
        "redis_one_call": ("... that is one call", 1e6),
        "redis_waiting": ("... for each that waits", 1e6),
        "redis_wake": ("Redis, each time that it was idle", 1e6),
        "redis_byte": ("Redis, 1,000 bytes that pass by", 1e9),
        "sender_push": ("generator, a push", 1e6),
        "sender_waiting": ("... for each that waits", 1e6),
        "sender_wake": ("generator, each time that it was idle", 1e6),
        "sender_byte": ("generator, 1,000 bytes", 1e9),
    }
    rows = [
        [title, *(digits(factor * costs[name]) for costs in found["fitted"].values())]
        for name, (title, factor) in names.items()
    ]
    heads = ["µs of CPU", *(f"{shards} shard{'s' if shards != '1' else ''}" for shards in found["fitted"])]
    return _table("fitted costs", heads, rows)


def _measured(found: Mapping[str, Any]) -> str:
    rows = []
    for point in found["points"]:
        parts = [1e3 * point[name] for name in ("loop_cpu", "update_cpu", "redis_cpu", "generator_cpu")]
        rows.append(
            [
                str(point["shards"]),
                _size(point["parameters"]),
                str(point["workers"]),
                f"{digits(point['pushes_per_s'])} ± {digits(point['spread'], 2)}",
                digits(1e3 * point["push_s"]),
                f"{point['staleness']:.1f}",
                *(f"{part:.2f}" for part in parts),
                f"{point['busy_cores']:.2f}",
                f"{point['redis_calls']:.1f}",
                f"{point['redis_call_us']:.0f}",
            ]
        )
    heads = [
        "shards",
        "parameters",
        "workers",
        "pushes a second",
        "ms of a push",
        "staleness",
        "event loops",
        "updates",
        "Redis",
        "generator",
        "cores in use",
        "Redis calls",
        "µs of one",
    ]
    return _table("by shards, size and workers; CPU of the parts in ms a push", heads, rows)


def _busy(found: Mapping[str, Any]) -> str:
    rows = [
        [str(each["shards"]), "1" if each["alone"] else "more", f"{100 * each['share']:.0f}%"] for each in found["busy"]
    ]
    return _table("how much threads do of what they are simulated to do", ["shards", "workers", "share"], rows)


def _compared(found: Mapping[str, Any]) -> str:
    rows = [
        [
            str(row["shards"]),
            _size(row["parameters"]),
            str(row["workers"]),
            digits(row["measured"]),
            digits(row["simulated"]),
            f"{100 * row['error']:+.0f}%{'' if row['is_within'] else ' **over**'}",
            f"{row['measured_staleness']:.1f}",
            f"{row['simulated_staleness']:.1f}",
            f"{row['measured_cores']:.2f}",
            f"{row['simulated_cores']:.2f}",
            "fitted" if row["is_fitted"] else "judged",
        ]
        for row in found["compared"]
    ]
    heads = ["shards", "parameters", "workers", "measured", "simulated", "error"]
    heads += ["staleness", "simulated", "cores in use", "simulated", "costs"]
    return _table("pushes a second", heads, rows)


def _summary(found: Mapping[str, Any]) -> str:
    judged = [row for row in found["compared"] if not row["is_fitted"]]
    within = sum(row["is_within"] for row in judged)
    worst = max(judged, key=lambda row: abs(row["error"]))
    middle = median(abs(row["error"]) for row in judged)
    return (
        f"Of {len(judged)} points that no cost was fitted on, {within} are within {WITHIN:.0%}; the median of the "
        f"errors' sizes is {middle:.0%}, and the largest is {worst['error']:+.0%} ({worst['shards']} shards, "
        f"{_size(worst['parameters'])}, {worst['workers']} workers)."
    )


def _store(found: Mapping[str, Any]) -> str:
    rows = [
        [
            each["policy"] + (", all others waiting" if each.get("waiting") else ""),
            str(each["shards"]),
            f"{each['workers']:,}",
            str(each["calls"]),
            digits(each["ms"]),
            digits(1e3 / each["ms"]),
        ]
        for each in found["store"]
    ]
    heads = ["policy", "shards", "workers", "calls of a push", "ms of Redis", "pushes a second at most"]
    return _table("what the scripts of a push cost Redis, with nobody listening", heads, rows)


def _costs(found: Mapping[str, Any]) -> str:
    figures = found["costs"]
    values = {
        "event loop, a push": f"{1e3 * figures['loop_push']:.2f} ms",
        "Redis, each that waits": f"{1e6 * figures['redis_waiting']:.2f} µs at {max(SHARDS)} shards",
        "event loop, a byte": f"{1e9 * figures['loop_byte']:.2f} ns",
        "update, a parameter": f"{1e12 * figures['update_parameter']:.1f} ps",
        "Redis, a push": f"the table above + {1e3 * figures['redis_call_more']:.3f} ms a call",
    }
    rows = [[name, values.get(name, ""), source] for name, source in sources().items()]
    lines = ["| cost | figure | source |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _outcome(row: Mapping[str, Any]) -> list[str]:
    return [
        digits(row["effective_per_s"]),
        _percent(row["of_ideal"]),
        digits(row["staleness"]),
        digits(row["cents_per_1000"]) if row["cents_per_1000"] else "",
    ]


def _regimes(regimes: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{_size(each['parameters'])}, {each['workers']:,} workers, {each['shards']} shard"
            f"{'s' if each['shards'] > 1 else ''}, {each['link']}",
            digits(each["plain"]["gb_a_shard"]),
            *_outcome(each["plain"]),
            f"**{each['plain']['bottleneck']}**",
        ]
        for each in regimes
    ]
    heads = [
        "regime (BF16)",
        "GB of a host",
        *_OUTCOME,
        "limited by",
    ]
    return _table("regimes, under ringmaster", heads, rows)


def _remedies(regimes: list[dict[str, Any]]) -> str:
    rows = []
    for each in regimes:
        name = f"{_size(each['parameters'])}, {each['workers']:,}, {each['shards']}, {each['link']}"
        for remedy, row in each["helped"].items():
            gain = row["effective_per_s"] / each["plain"]["effective_per_s"]
            limit = row["bottleneck"] + (f"; of a group: {row['inner']}" if "inner" in row else "")
            rows.append([name, remedy, f"{digits(gain)}", *_outcome(row), limit])
            name = ""
    heads = ["regime", "with", "times", *_OUTCOME, "then limited by"]
    return _table("what helps", heads, rows)


def _growth(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            f"{_size(row['parameters'])}, {row['local_steps']} a push",
            f"{row['workers']:,}",
            *_outcome(row),
            f"{row['expected_staleness']:,.0f}",
            row["bottleneck"],
        ]
        for row in rows
    ]
    heads = ["gradients to a push", "workers", *_OUTCOME, "expected staleness", "limited by"]
    return _table("more workers, 10 Gbit/s, one shard", heads, lines)


def _shards(rows: list[dict[str, Any]]) -> str:
    lines = [
        [_size(row["parameters"]), str(row["shards"]), digits(row["gb_a_shard"]), *_outcome(row), row["bottleneck"]]
        for row in rows
    ]
    heads = ["parameters", "shards", "GB of each host", *_OUTCOME, "limited by"]
    return _table("more shards, 64 workers, 400 Gbit/s", heads, lines)


def _policies(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            " ".join(
                f"{name}={value}" if name != "policy" else str(value) for name, value in row["aggregation"].items()
            ),
            digits(row["pushes_per_s"]),
            _percent(row["dropped"]),
            *_outcome(row),
            _percent(row["computing"]),
        ]
        for row in rows
    ]
    heads = ["policy", "pushes a second", "dropped", *_OUTCOME, "workers compute"]
    return _table("32 workers whose speeds differ (σ 0.5), 100M, 2 s a gradient", heads, lines)


def _durability(row: Mapping[str, Any]) -> str:
    kind = row["durability"]
    return kind if kind == "journal" else f"{kind}, every {row['checkpoint_s']:g} s"


def _failures(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            f"{row['mtbf_s'] / 3600:.3g} h",
            _durability(row),
            f"{row['computed']:,}",
            f"{row['lost']:,}",
            f"{row['undone']:,}",
            f"{100 * row['goodput']:.1f}%",
            _percent(row["of_ideal"]),
        ]
        for row in rows
    ]
    heads = [
        "MTBF",
        "durability",
        "computed",
        "lost on their way",
        "undone",
        "in the weights",
        "of what workers can that never fail",
    ]
    return _table("32 workers and 4 shards for an hour, 20 s a gradient", heads, lines)


def _scaling(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["name"],
            f"{row['seconds'] / 60:.0f}",
            f"{row['most']}",
            f"{row['mean']:.1f}",
            f"{row['staleness']:.1f}",
            f"{row['wait_s']:.1f}",
            f"{row['worker_s_per_gradient']:.1f}",
        ]
        for row in rows
    ]
    heads = [
        "workers",
        "minutes to the last unit",
        "workers, most",
        "mean",
        "staleness",
        "seconds of a push",
        "worker seconds a gradient",
    ]
    return _table("6,000 units, a gradient each", heads, lines)
