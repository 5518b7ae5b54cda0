"""What is measured of scale: the generator at a real service, costs fitted on points, and the page's figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale import tables
from benchmarks.scale.costs import on_machines_of_their_own
from benchmarks.scale.generator import Generator
from benchmarks.scale.measured import Point
from benchmarks.scale.rules import Desk, opened_desk
from benchmarks.scale.setup import Costs
from benchmarks.scale.simulation import simulate
from benchmarks.scale.store_costs import StoreCost
from benchmarks.scale.validation import ALONE, BUSY, compare, fit, is_fitted, setup_of
from benchmarks.worker import new_run
from freestep import Client
from harness import ThreadService

ROOT = Path(__file__).parents[2]
PAGE, FOLDER = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale"
KEPT = json.loads((Path(__file__).parent / "scale_points.json").read_text())
"""Points of one shard and of two, from a machine of which other programs took half meanwhile."""


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with opened_desk() as made:
        yield made


def test_pushes_of_a_real_service_are_as_many_calls_and_as_stale_as_simulated(
    service: ThreadService, desk: Desk
) -> None:
    workers, parameters = 8, 1000
    calls: list[int] = []
    with Client(service.url) as client, service.redis() as redis:
        run = new_run(client, "generated", parameters)

        def at_border() -> None:
            stats: Any = redis.info("commandstats")
            calls.append(stats["cmdstat_evalsha"]["calls"])

        with Generator(run, service.url, 1) as generator:
            taken, _ = generator.push(workers, 0.0, 1.0, at_border)
        status = run.status()
    pushes = len(taken.seconds)
    assert taken.without_y == 0 and pushes == len(taken.staleness)
    # Those before the window and behind it are in the run too.
    assert status.step >= pushes > workers
    # Admitted and committed; heartbeats beside, and pushes that are between the two at a border.
    assert 2 * pushes - workers <= calls[1] - calls[0] <= 2.5 * pushes + 20
    costs = Costs(loop_push=1e-3, loop_byte=0.0, update_parameter=0.0, redis_push=2e-4)
    point = Point(**{**KEPT["points"][0], "shards": 1, "parameters": parameters, "workers": workers})
    simulated = simulate(setup_of(point, costs, 2), desk, 400, warmup=50)
    # Between two pushes of a worker each push of the others counts once at most.
    for staleness in (sum(taken.staleness) / pushes, simulated.staleness):
        assert (workers - 1) / 2 <= staleness <= workers - 1


def point(shards: int, parameters: int, workers: int, costs: Costs) -> Point:
    """As if measured: CPU as the costs have it."""
    alone = workers == ALONE
    return replace(
        Point(**KEPT["points"][0]),
        shards=shards,
        parameters=parameters,
        workers=workers,
        loop_cpu=shards * (costs.loop_push + 5 * costs.loop_wake * alone) + 8 * parameters * costs.loop_byte,
        update_cpu=parameters * costs.update_parameter,
        redis_cpu=shards * costs.redis_push + 2 * costs.redis_wake * alone,
        generator_cpu=shards * costs.sender_push + 8 * parameters * costs.sender_byte,
    )


def test_costs_are_found_again() -> None:
    costs = Costs(
        loop_push=8e-4,
        loop_byte=4e-10,
        update_parameter=1e-9,
        redis_push=1e-4,
        sender_push=1e-4,
        sender_byte=2e-10,
        loop_wake=5e-5,
        redis_wake=1e-5,
    )
    points = [
        point(shards, parameters, workers, costs)
        for shards in (1, 2, 4)
        for parameters in (100_000, 300_000, 1_000_000)
        for workers in (ALONE, 4, BUSY, 64)
    ]
    assert sum(is_fitted(each, points) for each in points) == 8
    for shards, found in fit(points).items():
        assert found.loop_push == pytest.approx(costs.loop_push)
        assert found.redis_push == pytest.approx(shards * costs.redis_push)
        assert found.sender_push == pytest.approx(shards * costs.sender_push)
        assert found.loop_byte == pytest.approx(costs.loop_byte)
        assert found.update_parameter == pytest.approx(costs.update_parameter)
        assert found.loop_wake == pytest.approx(costs.loop_wake)


def test_throughput_is_predicted_where_no_cost_was_fitted(desk: Desk) -> None:
    compared = compare([Point(**each) for each in KEPT["points"]], KEPT["machine"]["cores"], desk)
    judged = [each for each in compared if not each.is_fitted]
    beyond = [
        (each.shards, each.parameters, each.workers, f"{each.error:+.0%}") for each in judged if not each.is_within
    ]
    assert len(beyond) <= len(judged) // 10, beyond


def test_redis_costs_between_the_shards_that_were_tried() -> None:
    store = [StoreCost("ringmaster", shards, 10, shards**1.5, 2 * shards) for shards in (1, 4, 64)]
    store += [StoreCost("ringmaster", 4, workers, workers / 1000, 8, waiting=True) for workers in (10, 510)]
    fitted = {1: Costs(1.0, 0, 0, 0), 4: Costs(2.0, 0, 0, 0)}
    made = {shards: on_machines_of_their_own(shards, fitted, store, 1e-3) for shards in (1, 2, 16, 64)}
    assert {shards: cost.redis_push for shards, cost in made.items()} == pytest.approx(
        {shards: 1e-3 * (shards**1.5 + 2 * shards) for shards in made}
    )
    assert [made[1].loop_push, made[16].loop_push] == [1.0, 2.0]
    assert [made[1].redis_waiting, made[16].redis_waiting] == pytest.approx([0.0, 1e-6])


def test_the_page_shows_what_was_found() -> None:
    found: dict[str, Any] = json.loads((FOLDER / "measured.json").read_text())
    found |= json.loads((FOLDER / "simulated.json").read_text())
    page = PAGE.read_text()
    made = tables.tables(found)
    shown = dict(re.findall(r"<!-- made: ([\w-]+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))
    assert shown == made
    for plot in FOLDER.glob("*.png"):
        assert f"(scale/{plot.name})" in page
