"""A discrete-event simulation of workers, a service and Redis: what a push waits for, and what becomes of it.

The law of this file: it knows when things happen, and decides nothing about pushes. `Rules` decides, which is the
service's own code; how many bodies a shard receives at once, and how many points it holds, are the service's functions
too. What is modelled and not run: who waits for a place goes first come, first served (as the queue of
coordination/lua/_prelude.lua), holds it until its push is applied (as the memory of state/staging.py), and of several
shards asks again each second (as runs/pushes.py); who waits for a point shares the next (as the cuts of _prelude.lua).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from math import inf
from typing import Any

from simpy import Environment, Event, Interrupt, Process

from benchmarks.scale.failures import Crashes, death
from benchmarks.scale.machines import Machines
from benchmarks.scale.outcome import Outcome
from benchmarks.scale.queues import Steps
from benchmarks.scale.rules import Desk, Rules
from benchmarks.scale.setup import Setup
from freestep.errors import EpochChanged, LeaseExpired
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.records import Ahead, Lost, Record

__all__ = ["ANSWER", "ASKING", "CLAIM", "COMMIT", "GATHERED", "Simulation", "simulate"]

_ASKED_AGAIN_S = 1.0
GATHERED = 12 / 28
"""Bytes of a pass that adds a push to a group, of those of an update."""
CLAIM, COMMIT, ANSWER = 0.4, 0.2, 0.4
"""Shares of what a push takes of an event loop beside its bytes: before its body comes, for the decision, and after."""
ASKING = 0.25
"""Of the same: what a push takes of it that asks again whether its turn has come."""


class _Worker:
    """A worker's name, its speed, the step of the y that it has, and how its push stands."""

    def __init__(self, name: str, pace: float) -> None:
        self.name = name
        self.pace = pace
        self.step = 0
        self.undecided = False
        self.admitted = False
        self.generation = 0
        self.process: Process | None = None
        self.retired = False


class Simulation:
    """One setup over simulated time."""

    def __init__(self, setup: Setup, desk: Desk) -> None:
        self.setup = setup
        self.env = Environment()
        spec = setup.spec()
        self.rules = Rules(desk, spec, setup.units)
        self.outcome = Outcome()
        self.on_decided: Callable[[], None] = lambda: None
        self.workers: dict[str, _Worker] = {}
        self._random = random.Random(setup.seed)
        self._is_one_call = setup.is_one_call
        self._loop_more = setup.loop_more
        self._waits_for_update = spec.aggregation.takes_one_each
        self._machines = Machines(self.env, setup, Policy.of(spec.aggregation))
        self._crashes = Crashes(self.env, setup, self.rules, self.outcome, self._random, self._rolled_back)
        self._update = self.env.event()
        self._applied_step = 0
        self._staleness = self._waiting = 0
        self._computing = 0.0
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._finished = self._served = 0
        self._live_since, self._live_time = 0.0, 0.0
        self._named = 0

    # The whole

    def run(
        self, pushes: float, warmup: float = 0, until_s: float = inf, is_over: Callable[[], bool] = lambda: False
    ) -> Outcome:
        """Simulates until so many pushes are decided, beside the warm-up's, a time has come, or it is over.

        warmup: pushes that are decided before the rates that the outcome has are measured.
        """
        self.add(self.setup.workers)
        if self.setup.failures.shard_mtbf_s < inf:
            self.env.process(self._crashes.crash())
            if self.setup.durability == "checkpoint":
                self.env.process(self._crashes.write_checkpoints())
        if warmup:
            self._until(warmup, until_s, is_over)
        warm = self.totals()
        self._until(self._decided + pushes, until_s, is_over)
        return self._result(warm)

    @property
    def _decided(self) -> int:
        return self.outcome.applied + self.outcome.accumulated + self.outcome.dropped

    def _until(self, pushes: float, until_s: float, is_over: Callable[[], bool]) -> None:
        reached = self.env.event()

        def look() -> None:
            if (self._decided >= pushes or is_over()) and not reached.triggered:
                reached.succeed()

        self.on_decided = look
        look()
        limit = self.env.timeout(until_s - self.env.now) if until_s < inf else None
        self.env.run(reached if limit is None else self.env.any_of([reached, limit]))
        self.on_decided = lambda: None

    def totals(self) -> dict[str, float]:
        """Sums since the beginning, of which rates are differences; `in X`: seconds of pushes that were at X."""
        self._count_live()
        return {
            "now": self.env.now,
            "decided": self._decided,
            "staleness": self._staleness,
            "waiting": self._waiting,
            "effective": self.rules.effective * self.setup.local_steps,
            "computing": self._computing,
            "live": self._live_time,
            "finished": self._finished,
            "served": self._served,
            **{f"use {part}": seconds for part, seconds in self._machines.used().items()},
            **{f"woken {part}": times for part, times in self._machines.woken().items()},
            **{f"in {what}": spent for what, spent in self._spent.items()},
        }

    def _result(self, warm: dict[str, float]) -> Outcome:
        outcome, end = self.outcome, self.totals()
        outcome.take(Counter({name: value - warm.get(name, 0.0) for name, value in end.items()}))
        outcome.under_way = sum(worker.undecided for worker in self.workers.values())
        outcome.expected_staleness = self.rules.expected
        outcome.units_done = self.rules.units_done() if self.setup.units else 0
        return outcome

    # Workers that come and go

    def add(self, count: int, delay_s: float = 0.0) -> None:
        """So many workers more; they begin at different moments of a gradient."""
        sigma, made = self.setup.speed_sigma, []
        for _ in range(count):
            pace = self._random.lognormvariate(0.0, sigma) if sigma else 1.0
            made.append(_Worker(f"worker-{self._named}", pace))
            self._named += 1
        if not delay_s:
            self.rules.join([each.name for each in made])
        for worker in made:
            self.workers[worker.name] = worker
            worker.process = self.env.process(self._live(worker, delay_s))

    def retire(self, count: int) -> None:
        """So many of the newest workers leave, after the push that they are at, with their leases."""
        for worker in [each for each in reversed(self.workers.values()) if not each.retired][:count]:
            worker.retired = True

    @property
    def live(self) -> int:
        """Workers that have not been told to leave."""
        return sum(not worker.retired for worker in self.workers.values())

    def _count_live(self) -> None:
        self._live_time += len(self.workers) * (self.env.now - self._live_since)
        self._live_since = self.env.now

    def _live(self, worker: _Worker, delay_s: float) -> Steps:
        failures = self.setup.failures
        if delay_s:
            yield self.env.timeout(delay_s)
        elif self.setup.compute_s:
            yield self.env.timeout(self._random.random() * self.setup.compute_s * self.setup.local_steps)
        while True:
            killer = None
            if failures.worker_mtbf_s < inf and worker.process is not None:
                killer = self.env.process(death(self.env, failures, self._random, worker.process))
            try:
                if not self.rules.has(worker.name):
                    self.rules.join([worker.name])
                    worker.step = self._applied_step
                yield from self._work(worker)
                break
            except Interrupt:
                self.outcome.died += 1
                self._lose(worker)
                worker.generation += 1
                self.env.process(self._expire(worker, worker.generation))
                yield self.env.timeout(failures.worker_restart_s)
            finally:
                if killer is not None and killer.is_alive and killer is not self.env.active_process:
                    killer.interrupt()
        self._count_live()
        del self.workers[worker.name]
        if self.rules.has(worker.name) and self.rules.leave(worker.name):
            self._updated()

    def _expire(self, worker: _Worker, generation: int) -> Steps:
        """Ends the lease of a worker that died, unless it has another by then."""
        yield self.env.timeout(min(self.setup.failures.lease_ttl_s, self.setup.failures.worker_restart_s))
        if worker.generation == generation and self.rules.has(worker.name) and self.rules.leave(worker.name):
            self._updated()

    def _lose(self, worker: _Worker) -> None:
        if worker.undecided:
            self.outcome.lost += 1
            if worker.admitted:
                self.rules.forget(worker.name)
        worker.undecided = worker.admitted = False

    # A push

    def _work(self, worker: _Worker) -> Steps:
        setup = self.setup
        while not worker.retired:
            units: tuple[int, ...] = ()
            if setup.units:
                if not self.rules.has(worker.name):
                    yield from self._join_again(worker)
                units = self.rules.take_units(worker.name, 1)
                if not units:
                    yield self.env.timeout(max(setup.compute_s, 0.01))
                    continue
            computing = self._gradient_s(worker)
            if computing:
                yield self.env.timeout(computing)
            self._computing += computing
            self.outcome.sent += 1
            worker.undecided = True
            began = self.env.now
            try:
                yield from self._push(worker, units)
            except (EpochChanged, LeaseExpired, Lost):
                self._lose(worker)
                yield from self._join_again(worker)
            self._spent["all"] += self.env.now - began
            self._finished += 1

    def _join_again(self, worker: _Worker) -> Steps:
        yield self._crashes.open
        if not self.rules.has(worker.name):
            self.rules.join([worker.name])
        worker.step = self._applied_step

    def _gradient_s(self, worker: _Worker) -> float:
        mean_s = self.setup.compute_s * self.setup.local_steps * worker.pace
        sigma = self.setup.jitter_sigma
        return mean_s * self._random.lognormvariate(-sigma * sigma / 2, sigma) if sigma else mean_s

    def _push(self, worker: _Worker, units: tuple[int, ...]) -> Steps:
        setup, costs, machines = self.setup, self.setup.costs, self._machines
        pushed, pulled = (setup.parameters * each for each in (setup.pushed_bytes, setup.pulled_bytes))
        yield from self._at("latency", self._sleep(setup.latency_s))
        claimed = self.env.now
        yield from self._at("loop", machines.loops(costs.loop_push * CLAIM))
        is_one_call = self._is_one_call
        record = None
        if not is_one_call:
            yield from self._at("Redis", machines.redis.use(costs.redis_push / 2))
            record = yield from self._admitted(worker, units)
        if record is None:
            yield from self._at("sender", machines.sender.use(costs.sender_push / 2))
            with machines.places.request() as place:
                yield from self._at("place", self._turn(place))
                began = self.env.now
                try:
                    yield from self._at("body in", machines.receive(pushed))
                    waiting = len(machines.places.queue)
                    calls = costs.redis_one_call if is_one_call else costs.redis_push / 2
                    calls += costs.redis_waiting * waiting + costs.redis_byte * (pushed + pulled)
                    yield from self._at("Redis", machines.redis.use(calls))
                    yield self._crashes.open
                    record = self._decided_now(worker) if is_one_call else self.rules.commit(worker.name)
                    worker.undecided = worker.admitted = False
                    self._count(record)
                    share = GATHERED if record.decision == "accumulated" else 1.0
                    self._waiting += waiting
                    deciding = costs.loop_push * COMMIT + costs.loop_waiting * waiting
                    deciding += self._loop_more
                    yield from self._at("loop", machines.loops(deciding))
                    if record.decision != "dropped":
                        yield from self._at("update", machines.writers(share * costs.update_parameter))
                finally:
                    machines.place_s += self.env.now - began
            self._applied_step = max(self._applied_step, record.step)
            self._spent["service"] += self.env.now - claimed
            self._served += 1
            if record.decision == "applied":
                self._updated()
        if record.decision == "accumulated" and self._waits_for_update:
            yield from self._at("update of the group", _one(self._update))
        place = yield from self._at("point", machines.points.take())
        step = max(self._applied_step, record.step)
        try:
            yield from self._at("loop", machines.loops(costs.loop_push * ANSWER))
            yield from self._at("body out", machines.send(pulled))
        finally:
            machines.points.leave(place)
        others = costs.sender_waiting * len(machines.places.queue)
        yield from self._at("sender", machines.sender.use(costs.sender_push / 2 + others))
        yield from self._at("latency", self._sleep(setup.latency_s))
        worker.step = step

    def _decided_now(self, worker: _Worker) -> Record:
        if not self.rules.has(worker.name):
            raise LeaseExpired
        return self.rules.push(worker.name, min(worker.step, self.rules.step))

    def _turn(self, place: Event) -> Steps:
        """Waits for a place. Shards of several ask Redis whether they have missed their turn, as in runs/pushes.py."""
        if self.setup.shards == 1:
            yield place
            return
        costs = self.setup.costs
        while not place.triggered:
            yield self.env.any_of([place, self.env.timeout(_ASKED_AGAIN_S)])
            if not place.triggered:
                yield from self._machines.loops(costs.loop_push * ASKING)
                yield from self._machines.redis.use(costs.redis_push / 2)
        yield place

    def _admitted(self, worker: _Worker, units: tuple[int, ...]) -> Steps:
        while True:
            yield self._crashes.open
            if not self.rules.has(worker.name):
                raise LeaseExpired
            try:
                record = self.rules.admit(worker.name, min(worker.step, self.rules.step), units)
            except Ahead:
                yield from self._at("slowest worker", _one(self._update))
                continue
            if record is None:
                worker.admitted = True
            else:
                worker.undecided = False
                self._count(record)
            return record

    def _count(self, record: Record) -> None:
        outcome = self.outcome
        setattr(outcome, record.decision, getattr(outcome, record.decision) + 1)
        self._staleness += record.staleness
        self.on_decided()

    def _updated(self) -> None:
        self._applied_step = max(self._applied_step, self.rules.step)
        update, self._update = self._update, self.env.event()
        update.succeed()

    def _rolled_back(self) -> None:
        self._applied_step = self.rules.step
        self._updated()

    # What a push uses

    def _at(self, what: str, steps: Steps) -> Steps:
        began = self.env.now
        answer = yield from steps
        self._spent[what] += self.env.now - began
        return answer

    def _sleep(self, seconds: float) -> Steps:
        if seconds:
            yield self.env.timeout(seconds)


def _one(event: Event) -> Steps:
    yield event


def simulate(setup: Setup, desk: Desk, pushes: float, warmup: float = 0, **more: Any) -> Outcome:
    """The outcome of a setup: see `Simulation.run`."""
    return Simulation(setup, desk).run(pushes, warmup, **more)
