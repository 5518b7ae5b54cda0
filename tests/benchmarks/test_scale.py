"""The simulation of scale: its queues against closed forms, its laws, and the service's own rules within it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from simpy import Environment, Interrupt, Resource

from benchmarks.scale.bottlenecks import REMEDIES, bottleneck
from benchmarks.scale.machines import MOST_PUSH_POINTS
from benchmarks.scale.outcome import Outcome
from benchmarks.scale.queues import Line, SharedPlaces, Steps, Thread
from benchmarks.scale.rules import Desk, Rules, opened_desk
from benchmarks.scale.setup import Costs, Failures, Setup
from benchmarks.scale.simulation import ANSWER, CLAIM, COMMIT, Simulation, simulate
from freestep.errors import EpochChanged

LUA = Path(__file__).parents[2] / "service" / "freestep_service" / "coordination" / "lua"
COSTS = Costs(loop_push=1e-3, loop_byte=0.0, update_parameter=1e-9, redis_push=2e-4)
PLAIN = Setup(parameters=1000, workers=8, costs=COSTS, compute_s=0.1)
FAILING = Failures(
    worker_mtbf_s=2.0, worker_restart_s=0.5, shard_mtbf_s=8.0, recovery_s=0.3, checkpoint_s=1.0, lease_ttl_s=0.2
)


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with opened_desk() as made:
        yield made


def poisson(env: Environment, rate: float, arrivals: int, served: Any, waits: list[float]) -> Steps:
    """Arrivals at random moments, each served by a function; how long each is there."""
    source = random.Random(0)

    def one() -> Steps:
        began = env.now
        yield from served()
        waits.append(env.now - began)

    for _ in range(arrivals):
        yield env.timeout(source.expovariate(rate))
        env.process(one())


# Queues


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_a_thread_is_the_queue_with_even_service(load: float) -> None:
    # Pollaczek and Khinchine: M/D/1 waits load / (2 (1 - load)) services before its own.
    env, waits = Environment(), list[float]()
    thread = Thread(env)
    env.process(poisson(env, load, 30_000, lambda: thread.use(1.0), waits))
    env.run()
    assert sum(waits) / len(waits) == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)
    assert thread.busy / env.now == pytest.approx(load, rel=0.02)


def test_a_line_is_the_queue_that_shares_itself_out() -> None:
    # M/G/1 with processor sharing: 1 / (1 - load) times the time alone, whatever the sizes.
    env, waits = Environment(), list[float]()
    line, sizes = Line(env, 1.0), random.Random(1)

    def transfer() -> Steps:
        yield line.transfer(sizes.expovariate(1.0))

    env.process(poisson(env, 0.6, 40_000, transfer, waits))
    env.run()
    line.advance()
    assert sum(waits) / len(waits) == pytest.approx(1 / (1 - 0.6), rel=0.07)
    assert line.busy / env.now == pytest.approx(0.6, rel=0.02)


def test_transfers_share_a_line_up_to_their_own() -> None:
    env, ends = Environment(), dict[str, float]()
    line = Line(env, 10.0, own=6.0)

    def one(name: str, begin: float, size: float) -> Steps:
        yield env.timeout(begin)
        yield line.transfer(size)
        ends[name] = env.now

    env.process(one("alone at first", 0.0, 12.0))
    env.process(one("beside it", 1.0, 5.0))
    env.run()
    # 6 a second alone; then 5 each, which ends the second after a second, with 1 left of the first.
    assert ends == pytest.approx({"beside it": 2.0, "alone at first": 2.0 + 1 / 6})


def test_who_waits_for_a_point_shares_the_next() -> None:
    env, got = Environment(), list[tuple[float, int]]()
    places = SharedPlaces(env, 1)

    def reader(seconds: float) -> Steps:
        place = yield from places.take()
        got.append((env.now, place))
        yield env.timeout(seconds)
        places.leave(place)

    for seconds in (2.0, 1.0, 3.0):
        env.process(reader(seconds))
    env.run()
    places.count()
    assert got == [(0.0, 1), (2.0, 2), (2.0, 2)]
    assert (env.now, places.busy) == (5.0, 5.0)


def test_who_dies_while_waiting_for_a_point_keeps_none() -> None:
    env = Environment()
    places = SharedPlaces(env, 1)

    def reader(seconds: float) -> Steps:
        place = yield from places.take()
        yield env.timeout(seconds)
        places.leave(place)

    def doomed() -> Steps:
        try:
            yield from places.take()
        except Interrupt:
            return

    env.process(reader(2.0))
    early, late = env.process(doomed()), env.process(doomed())

    def kill() -> Steps:
        yield env.timeout(1.0)
        early.interrupt()
        yield env.timeout(1.0)
        # The place has just been given to it.
        late.interrupt()

    env.process(kill())
    env.run(until=3.0)
    env.process(reader(1.0))
    env.run()
    assert env.now == 4.0


def test_threads_that_share_cores_take_turns() -> None:
    env = Environment()
    cores = Resource(env, 2)
    threads = [Thread(env, cores) for _ in range(3)]
    for thread in threads:
        env.process(thread.use(1.0))
    env.run()
    assert env.now == 2.0 and sum(thread.busy for thread in threads) == 3.0


def test_an_idle_thread_takes_longer_to_begin() -> None:
    env = Environment()
    thread = Thread(env, wake=0.5)

    def uses() -> Steps:
        yield env.timeout(1.0)
        yield from thread.use(1.0)
        yield from thread.use(1.0)

    env.process(uses())
    env.run()
    assert env.now == 3.5


# The laws of a simulation


def accounted(outcome: Outcome) -> int:
    return outcome.applied + outcome.accumulated + outcome.dropped + outcome.lost + outcome.under_way


POLICIES: list[dict[str, Any]] = [
    {"policy": "ringmaster"},
    {"policy": "async", "max_staleness": 3},
    {"policy": "sync"},
    {"policy": "quorum", "batch": 4},
    {"policy": "buffered", "batch": 3},
    {"policy": "rennala", "batch": 3},
    {"policy": "ssp", "slack": 2},
]


@pytest.mark.parametrize("aggregation", POLICIES, ids=lambda each: each["policy"])
@pytest.mark.parametrize("failures", [Failures(), FAILING], ids=["sound", "failing"])
def test_pushes_are_decided_lost_or_under_way(desk: Desk, aggregation: dict[str, Any], failures: Failures) -> None:
    setup = replace(PLAIN, aggregation=aggregation, failures=failures, speed_sigma=0.4, jitter_sigma=0.2, shards=2)
    outcome = simulate(setup, desk, 400, until_s=60.0)
    assert outcome.sent == accounted(outcome) > 100
    assert all(0.0 <= share <= 1.0 + 1e-9 for share in outcome.use.values()), outcome.use
    assert 0.0 < outcome.computing <= 1.0
    if failures == Failures():
        assert outcome.lost == outcome.undone == 0


@pytest.mark.parametrize("workers", [1, 2, 5, 16])
def test_equal_workers_are_as_stale_as_they_are_many_less_one(desk: Desk, workers: int) -> None:
    outcome = simulate(replace(PLAIN, workers=workers), desk, 20 * workers, warmup=2 * workers)
    # Who is answered with another's newer y is one step less stale.
    assert workers - 1.15 <= outcome.staleness <= workers - 1
    assert outcome.expected_staleness == workers - 1


def test_a_seed_has_one_outcome(desk: Desk) -> None:
    setup = replace(PLAIN, speed_sigma=0.3, jitter_sigma=0.3, failures=FAILING, units=10_000)
    one, same, other = (simulate(replace(setup, seed=seed), desk, 200, until_s=60.0) for seed in (1, 1, 2))
    assert asdict(one) == asdict(same) != asdict(other)


def test_workers_without_contention_push_as_often_as_they_can(desk: Desk) -> None:
    setup = replace(PLAIN, workers=3, compute_s=1.0, latency_s=0.01)
    outcome = simulate(setup, desk, 90, warmup=9)
    # The loop, Redis and one update of 1,000 parameters, and the way there and back.
    push_s = 1e-3 + 2e-4 + 1e-6 + 0.02
    assert outcome.pushes_per_s == pytest.approx(3 / (1.0 + push_s), rel=0.02)
    assert outcome.waits["all"] == pytest.approx(push_s, rel=0.02)
    assert bottleneck(outcome) == "workers"


@pytest.mark.parametrize(
    ("setup", "rate", "limit"),
    [
        (replace(PLAIN, workers=64, compute_s=0.0), 1e3, "event loop"),
        (replace(PLAIN, workers=64, compute_s=0.0, costs=replace(COSTS, redis_push=0.01)), 100.0, "Redis"),
        (replace(PLAIN, workers=64, compute_s=0.0, parameters=10_000_000), 100.0, "writer"),
        # 4 kB over a line of 40 kB a second; two bodies at a time, as the service receives those of one shard.
        (replace(PLAIN, workers=64, compute_s=0.0, link=40e3), 20.0, "places"),
        (replace(PLAIN, workers=64, compute_s=0.0, port=100e3), 25.0, "port"),
        (replace(PLAIN, workers=1, compute_s=0.0, link=40e3), 5.0, "link"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_full_limits_a_run(desk: Desk, setup: Setup, rate: float, limit: str) -> None:
    outcome = simulate(setup, desk, 300, warmup=100)
    assert outcome.pushes_per_s == pytest.approx(rate, rel=0.06)
    assert bottleneck(outcome) == limit


def test_a_push_is_at_its_event_loop_for_all_that_it_costs(desk: Desk) -> None:
    assert CLAIM + COMMIT + ANSWER == pytest.approx(1.0)
    outcome = simulate(replace(PLAIN, cores=2, is_inline=True), desk, 200, warmup=50)
    assert outcome.use["loop"] / outcome.pushes_per_s == pytest.approx(1e-3 + 1000 * 1e-9, rel=0.03)


def test_points_of_several_shards_are_those_that_redis_grants() -> None:
    prelude = (LUA / "_prelude.lua").read_text()
    assert f"MOST_CUTS = 4, {{push = {MOST_PUSH_POINTS}," in prelude


def test_remedies_are_what_they_say() -> None:
    by_name = {remedy.name: remedy for remedy in REMEDIES}
    assert by_name["4 times the shards"].applied_to(PLAIN).shards == 4
    slow = replace(PLAIN, link=12.5e6)
    assert by_name["slow_bytes_per_second above the links"].applied_to(slow).more_places == 2 * slow.workers
    assert not by_name["slow_bytes_per_second above the links"].helps("places", PLAIN)


# The service's own rules


def test_a_bound_on_staleness_drops_pushes(desk: Desk) -> None:
    bounded = simulate(replace(PLAIN, aggregation={"policy": "async", "max_staleness": 3}), desk, 200)
    assert bounded.dropped > 0 and bounded.staleness > 0
    free = simulate(replace(PLAIN, aggregation={"policy": "async"}), desk, 200)
    assert free.dropped == 0


def test_synchronous_updates_are_of_all_workers(desk: Desk) -> None:
    outcome = simulate(replace(PLAIN, aggregation={"policy": "sync"}, speed_sigma=0.5), desk, 160)
    assert (outcome.applied, outcome.accumulated, outcome.dropped) == (20, 140, 0)
    assert outcome.staleness == 0


def test_damping_leaves_less_of_stale_gradients(desk: Desk) -> None:
    damped = simulate(
        replace(PLAIN, aggregation={"policy": "async", "staleness_damping": "inverse_sqrt"}), desk, 160, warmup=32
    )
    assert damped.effective_per_s / damped.pushes_per_s == pytest.approx(8**-0.5, rel=0.02)


@pytest.mark.parametrize("durability", ["checkpoint", "journal"])
def test_every_unit_counts_once_whatever_fails(desk: Desk, durability: str) -> None:
    setup = replace(PLAIN, units=400, failures=FAILING, durability=durability, speed_sigma=0.3)
    simulation = Simulation(setup, desk)
    outcome = simulation.run(inf, until_s=600.0, is_over=lambda: simulation.rules.counted == 400)
    assert outcome.died > 0 and outcome.crashes > 0
    assert outcome.units_done == 400 == outcome.applied + outcome.accumulated - outcome.undone
    (state,) = simulation.rules.data.states().values()
    assert (state.reached, state.open) == (400, ())
    assert (outcome.undone > 0) == (durability == "checkpoint")


def test_a_run_that_goes_back_is_as_its_checkpoint_was(desk: Desk) -> None:
    rules = Rules(desk, PLAIN.spec(), units=10)
    rules.join(["a", "b"])

    def push(worker: str) -> int:
        units = rules.take_units(worker, 1)
        assert rules.admit(worker, rules.step, units) is None
        return rules.commit(worker).step

    assert [push("a"), push("b")] == [1, 2]
    rules.checkpoint()
    assert [push("a"), push("b"), push("a")] == [3, 4, 5]
    assert rules.admit("b", rules.step) is None
    assert rules.roll_back() == 3
    assert (rules.step, rules.counted, rules.units_done()) == (2, 2, 2)
    assert not rules.has("a")
    rules.join(["a"])
    assert rules.take_units("a", 10) == tuple(range(2, 10))


def test_a_lease_of_an_earlier_epoch_pushes_no_more(desk: Desk) -> None:
    rules = Rules(desk, PLAIN.spec())
    rules.join(["a"])
    lease = rules._leases["a"]
    rules.roll_back()
    rules._leases["a"] = lease
    with pytest.raises(EpochChanged):
        rules.admit("a", 0)


def test_the_decision_is_the_same_over_shards(desk: Desk) -> None:
    def decided(shards: int) -> list[tuple[str, int, int]]:
        rules = Rules(desk, replace(PLAIN, aggregation={"policy": "quorum", "batch": 2}).spec(), shards=shards)
        rules.join(["a", "b", "c"])
        found = []
        for worker, taken_at in (("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1)):
            record = rules.admit(worker, taken_at) or rules.commit(worker)
            found.append((record.decision, record.step, record.staleness))
        return found

    assert decided(1) == decided(3)
