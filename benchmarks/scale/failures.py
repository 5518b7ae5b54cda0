"""How a simulated service and its workers fail, and what is taken back then.

Failures come at random, and the service's own code says what they undo: `Rules` opens a run at its checkpoint in a new
epoch, which ends all leases.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from simpy import Environment, Interrupt, Process

from benchmarks.scale.outcome import Outcome
from benchmarks.scale.queues import Steps
from benchmarks.scale.rules import Rules
from benchmarks.scale.setup import Failures, Setup

__all__ = ["Crashes", "death"]


class Crashes:
    """The crashes of one setup's shards, and the checkpoints to which they take its run back.

    rolled_back: called when the run has gone back.
    """

    def __init__(
        self,
        env: Environment,
        setup: Setup,
        rules: Rules,
        outcome: Outcome,
        source: Random,
        rolled_back: Callable[[], None],
    ) -> None:
        self.open = env.event()
        """Happens when the run is open; another from each crash on."""
        self.open.succeed()
        self._env = env
        self._setup = setup
        self._rules = rules
        self._outcome = outcome
        self._random = source
        self._rolled_back = rolled_back

    def crash(self) -> Steps:
        """One crash after the other."""
        failures = self._setup.failures
        while True:
            yield self._env.timeout(self._random.expovariate(self._setup.shards / failures.shard_mtbf_s))
            self._outcome.crashes += 1
            self.open = self._env.event()
            yield self._env.timeout(failures.recovery_s)
            if self._setup.durability != "journal":
                self._outcome.undone += self._rules.roll_back()
                self._rolled_back()
            self.open.succeed()

    def write_checkpoints(self) -> Steps:
        """One checkpoint after the other, while the run is open."""
        while True:
            yield self._env.timeout(self._setup.failures.checkpoint_s)
            if self.open.triggered:
                self._rules.checkpoint()


def death(env: Environment, failures: Failures, source: Random, worker: Process) -> Steps:
    """Interrupts a worker when its time has come; ends with it where it is interrupted itself."""
    try:
        yield env.timeout(source.expovariate(1 / failures.worker_mtbf_s))
    except Interrupt:
        return
    if worker.is_alive:
        worker.interrupt()
