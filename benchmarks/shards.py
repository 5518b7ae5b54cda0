"""What it costs to cut a run into shards: `python -m benchmarks.shards`.

One worker pushes a fp32 gradient to 1, 2 and 4 shards, has AdamW Schedule-Free applied, and receives fresh y: with
all shards in one service process, and with a process for each. CPU is that of all the service processes, whichever of
them have shards, since one without a shard has its heartbeat too. Rounds of the numbers of shards alternate, so that
all see the same machine; figures are medians over the rounds, and a ratio is the median of each round's ratio to 1
shard. Redis is asked for its own account of the calls, by MONITOR, in rounds that are not timed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from redis import Redis
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, Report, spread
from benchmarks.options import Options, parser_of_sizes
from benchmarks.placing import place
from benchmarks.services import Service, cpu_seconds, running_service
from benchmarks.worker import Worker
from freestep import Client, FreestepError, Run
from freestep_service.coordination.embedded import embedded_store
from freestep_service.coordination.store import scripts

SHARDS = (1, 2, 4)
SIZES = {5_000_000: 40, 25_000_000: 20}
"""Parameters, and how many rounds are counted."""
QUICK_SIZES = {5_000_000: 5}
PLACEMENTS = {"one process": 1, "a process each": max(SHARDS)}
"""How many service processes share the runs."""
WARMUP = 3
COUNTED_PUSHES = 11
"""In which Redis's calls are counted."""

MOST_CPU, MOST_TIME, MOST_CALLS = 1.10, 1.15, 3.0
"""The bounds: of CPU per byte and of push + pull, at 25 million parameters, both as ratios of 4 shards to 1; and of
Redis calls per shard and push."""
BOUND_AT = 25_000_000

_SETTLED_S = 0.02
"""What a push leaves to be done after its answer is done by then."""
_HEARTBEATS = {"node_heartbeat", "run_heartbeat", "leases_due", "leases_expire", "lease_renew", "smembers", "subscribe"}
"""Calls that are made whether or not anybody pushes."""


def _script_names() -> dict[str, str]:
    """What the service's scripts are called, by the digests that EVALSHA names them by."""
    return {hashlib.sha1(text.encode()).hexdigest(): name for name, text in scripts().items()}


# Before the services read them, since a script that is edited meanwhile has another digest.
_SCRIPTS = _script_names()


@dataclass(frozen=True)
class Round:
    """Seconds of one push + pull, and of CPU that it took the services and Redis."""

    seconds: float
    service_cpu: float
    redis_cpu: float


class Subject:
    """A run under measurement: its worker, the processes that serve it, and what was measured."""

    def __init__(self, worker: Worker, shards: int, pids: Sequence[int], redis_pid: int) -> None:
        self.worker = worker
        self.shards = shards
        self.rounds: list[Round] = []
        self.calls: dict[str, float] = {}
        self._pids = pids
        self._redis_pid = redis_pid

    def timed_push(self) -> Round:
        services, redis = self._cpu()
        seconds = self.worker.push()
        time.sleep(_SETTLED_S)
        services_after, redis_after = self._cpu()
        return Round(seconds, services_after - services, redis_after - redis)

    def _cpu(self) -> tuple[float, float]:
        return sum(map(cpu_seconds, self._pids)), cpu_seconds(self._redis_pid)


@dataclass(frozen=True)
class Row:
    """Medians of one number of shards, and ratios to 1 shard; `spread_ms` is between the quartiles."""

    placement: str
    parameters: int
    shards: int
    push_pull_ms: float
    spread_ms: float
    push_pull_ratio: float
    push_pull_ratio_spread: float
    """Half the distance between the quartiles."""
    service_ns_per_byte: float
    redis_ns_per_byte: float
    cpu_ratio: float
    cpu_ratio_spread: float
    calls_per_shard_and_push: float
    calls: dict[str, float]
    """By the script's or command's name, per shard and push."""


def measure(services: Sequence[Service], store: Redis, placement: str, parameters: int, rounds: int) -> list[Row]:
    """Alternates rounds of the numbers of shards for one model size."""
    with Client(services[0].url) as client, ExitStack() as leases:
        runs = {shards: client.run(f"shards-{parameters}-{shards}") for shards in SHARDS}
        subjects = [_subject(run, services, store, parameters, shards) for shards, run in runs.items()]
        for subject in subjects:
            leases.enter_context(subject.worker)
        for number in range(WARMUP + rounds):
            # Each in turn is the first of a round.
            for place in range(len(subjects)):
                subject = subjects[(number + place) % len(subjects)]
                taken = subject.timed_push()
                if number >= WARMUP:
                    subject.rounds.append(taken)
        for subject in subjects:
            subject.calls = _calls(store, subject.worker.push)
        leases.close()
        for run in runs.values():
            run.delete()
    return [_row(placement, parameters, subject, subjects[0]) for subject in subjects]


def _subject(run: Run, services: Sequence[Service], store: Redis, parameters: int, shards: int) -> Subject:
    place(run, services, parameters, shards)
    pids = [service.pid for service in services]
    return Subject(Worker(run), shards, pids, store.info("server")["process_id"])


def _calls(store: Redis, push: Callable[[], object]) -> dict[str, float]:
    """Calls that Redis gets for a push, by the script's or command's name: the median of several pushes.

    The median leaves out what a heartbeat brings about now and then: a look at the log, a new connection.
    """
    pushes = [Counter[str]()]
    with store.monitor() as monitor:  # type: ignore[no-untyped-call]
        for _ in range(COUNTED_PUSHES):
            push()
            time.sleep(_SETTLED_S)
            store.echo("pushed")
        while len(pushes) <= COUNTED_PUSHES:
            command = monitor.next_command()
            verb, _, rest = command["command"].lower().partition(" ")
            name = _SCRIPTS.get(rest.partition(" ")[0], verb)
            if name == "echo":
                pushes.append(Counter())
            elif command["client_type"] != "lua" and name not in _HEARTBEATS:
                pushes[-1][name] += 1
    medians = {name: median(push[name] for push in pushes[:-1]) for name in sorted(set().union(*pushes))}
    return {name: count for name, count in medians.items() if count}


def _row(placement: str, parameters: int, subject: Subject, single: Subject) -> Row:
    def ratios(figure: Callable[[Round], float]) -> list[float]:
        return [figure(mine) / figure(other) for mine, other in zip(subject.rounds, single.rounds, strict=True)]

    def ns_per_byte(figure: Callable[[Round], float]) -> float:
        return 1e9 * median(map(figure, subject.rounds)) / subject.worker.bytes_moved

    seconds = [each.seconds for each in subject.rounds]
    time_ratios = ratios(lambda each: each.seconds)
    cpu_ratios = ratios(lambda each: each.service_cpu + each.redis_cpu)
    shares = {name: count / subject.shards for name, count in subject.calls.items()}
    return Row(
        placement=placement,
        parameters=parameters,
        shards=subject.shards,
        push_pull_ms=1e3 * median(seconds),
        spread_ms=2e3 * spread(seconds),
        push_pull_ratio=median(time_ratios),
        push_pull_ratio_spread=spread(time_ratios),
        service_ns_per_byte=ns_per_byte(lambda each: each.service_cpu),
        redis_ns_per_byte=ns_per_byte(lambda each: each.redis_cpu),
        cpu_ratio=median(cpu_ratios),
        cpu_ratio_spread=spread(cpu_ratios),
        calls_per_shard_and_push=sum(shares.values()),
        calls=shares,
    )


def bounds(row: Row) -> dict[str, bool]:
    """The bounds that there are for a row, and whether it is within them."""
    within = {"calls": row.calls_per_shard_and_push <= MOST_CALLS}
    if row.shards == max(SHARDS) and row.parameters == BOUND_AT:
        within |= {"cpu": row.cpu_ratio <= MOST_CPU, "push + pull": row.push_pull_ratio <= MOST_TIME}
    return within


def _print(rows: Sequence[Row]) -> None:
    table = Table(
        title="push + pull by shards, fp32: ms, and CPU in ns per byte moved",
        caption="×: the ratio to 1 shard, of CPU with Redis's; calls: of Redis, per shard and push.\n"
        f"Bounds: {MOST_TIME:.2f} of ms and {MOST_CPU:.2f} of CPU at {BOUND_AT:,} parameters, {MOST_CALLS:g} calls.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("parameters", no_wrap=True)
    for name in ("shards", "ms ± quartile", "×", "CPU", "Redis", "×", "calls"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        within = bounds(row)
        label = {SHARDS[0]: f"{row.parameters:,}", SHARDS[1]: row.placement}.get(row.shards, "")
        table.add_row(
            label,
            str(row.shards),
            f"{row.push_pull_ms:.1f} ± {row.spread_ms / 2:.1f}",
            f"{row.push_pull_ratio:.2f}{_verdict(within, 'push + pull')}",
            f"{row.service_ns_per_byte:.3f}",
            f"{row.redis_ns_per_byte:.3f}",
            f"{row.cpu_ratio:.2f}{_verdict(within, 'cpu')}",
            f"{row.calls_per_shard_and_push:g}{_verdict(within, 'calls')}",
            end_section=row.shards == SHARDS[-1],
        )
    console = Console()
    console.print(table)
    for shards in SHARDS:
        calls = max((row.calls for row in rows if row.shards == shards), key=lambda calls: sum(calls.values()))
        listed = ", ".join(f"{name} {count:g}" for name, count in calls.items())
        console.print(f"calls at {shards} shard{'s' if shards > 1 else ''}: {listed}", highlight=False)


def _verdict(within: dict[str, bool], name: str) -> str:
    return "" if name not in within else " ok" if within[name] else " over"


def _document(row: Row) -> dict[str, Any]:
    return {**asdict(row), "within": bounds(row)}


def measure_placements(sizes: dict[int, int]) -> list[Row]:
    """Each placement in turn, and in it each size, with so many rounds."""
    rows: list[Row] = []
    for placement, processes in PLACEMENTS.items():
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="freestep-bench-"))
            redis_url = stack.enter_context(embedded_store(Path(folder)))
            store = stack.enter_context(Redis.from_url(redis_url, decode_responses=True))
            shared = {"redis_url": redis_url, "checkpoint_url": f"{folder}/checkpoints"}
            services = [stack.enter_context(running_service(**shared)) for _ in range(processes)]
            for parameters, rounds in sizes.items():
                rows += measure(services, store, placement, parameters, rounds)
    return rows


def report(options: Options) -> Report:
    rows = measure_placements(QUICK_SIZES if options.quick else SIZES)
    largest = max(row.parameters for row in rows)
    figures = []
    for row in rows:
        if row.parameters == largest and row.shards > 1:
            bounded = "cpu" in bounds(row)
            name = f"{row.parameters / 1e6:g}M over {row.shards} shards, {row.placement}, of 1 shard"
            taken = ("push + pull", row.push_pull_ratio, row.push_pull_ratio_spread, MOST_TIME)
            used = ("CPU", row.cpu_ratio, row.cpu_ratio_spread, MOST_CPU)
            for title, ratio, ratio_spread, most in (taken, used):
                figures.append(Figure(f"{name}: {title}", ratio, ratio_spread, "×", most if bounded else None))
    calls = max(row.calls_per_shard_and_push for row in rows)
    figures.append(Figure("Redis calls per shard and push, the most of any", calls, 0.0, "", MOST_CALLS))
    return Report(figures, details=[_document(row) for row in rows])


def main() -> None:
    options = parser_of_sizes(__doc__, SIZES).parse_args()
    torch.set_num_threads(1)
    try:
        rows = measure_placements({size: rounds for size, rounds in SIZES.items() if size <= options.largest})
    except FreestepError as error:
        sys.exit(str(error))
    if options.json:
        print(json.dumps([_document(row) for row in rows], indent=2))
    else:
        _print(rows)


if __name__ == "__main__":
    main()
