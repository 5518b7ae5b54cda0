"""What is simulated: a model, workers, links, a service, what all of it costs, and how it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from freestep.api.models import RunSpec
from freestep_service.domain.aggregation import Policy
from freestep_service.web.head import Bounds
from freestep_service.web.responses import SHORT

__all__ = ["Costs", "Failures", "Setup"]


@dataclass(frozen=True)
class Costs:
    """Seconds of threads. Where each is from is said by `costs.sources`."""

    loop_push: float
    """A shard's event loop, for its part of a push without its bytes."""
    loop_byte: float
    """... for a byte of a body, in or out."""
    update_parameter: float
    """A shard's writer, for a parameter of an update."""
    redis_push: float
    """Redis, for a push with all its shards' calls."""
    redis_one_call: float = 0.0
    """... for one whose claim and body are one call."""
    loop_hand_over: float = 0.0
    """A shard's event loop, for giving its part of a push to the writer's thread, where that updates it."""
    loop_long_body: float = 0.0
    """... for receiving its part of a body in place, where that does not come with the head."""
    loop_long_answer: float = 0.0
    """... for sending its part of a point in pieces."""
    loop_waiting: float = 0.0
    """... for its part of a push for each other push that waits for a place."""
    redis_byte: float = 0.0
    """Redis, for a byte of a body that passes the caches which it shares with others."""
    redis_waiting: float = 0.0
    """Redis, for a push for each other that waits for a place; only of several shards."""
    sender_push: float = 0.0
    """The thread that all workers share, where they do, for a push without its bytes."""
    sender_byte: float = 0.0
    sender_waiting: float = 0.0
    """... for a push for each other that waits for a place."""
    loop_wake: float = 0.0
    """What a loop takes more for each thing that it does where it was idle; and so the others."""
    redis_wake: float = 0.0
    sender_wake: float = 0.0


@dataclass(frozen=True)
class Failures:
    """Means of exponential distributions, in seconds; infinite where nothing fails."""

    worker_mtbf_s: float = inf
    worker_restart_s: float = 60.0
    """Until another is there in its place; not random."""
    shard_mtbf_s: float = inf
    """Of each shard."""
    recovery_s: float = 5.0
    """Until the run is open again; not random."""
    checkpoint_s: float = 30.0
    """Between checkpoints."""
    lease_ttl_s: float = 30.0


@dataclass(frozen=True)
class Setup:
    """One simulation. Sizes are in parameters, rates in bytes a second, times in seconds."""

    parameters: int
    workers: int
    costs: Costs
    shards: int = 1
    compute_s: float = 0.0
    """The mean of a gradient."""
    link: float = inf
    """Of each worker, each way."""
    port: float = inf
    """Of the machine of each shard, each way."""
    latency_s: float = 0.0
    """One way."""
    pushed_bytes: float = 4.0
    """A parameter; so are the pulled ones."""
    pulled_bytes: float = 4.0
    more_places: int = 0
    """For bodies and points together, of the reserve that slow peers may hold, where the workers count as such."""
    local_steps: int = 1
    """Gradients of a worker to each push."""
    speed_sigma: float = 0.0
    """Of the logarithms of the workers' speeds, which are normal with mean 0."""
    jitter_sigma: float = 0.0
    """... and of a gradient's time, each time anew."""
    aggregation: Mapping[str, Any] = field(default_factory=lambda: {"policy": "ringmaster"})
    durability: str = "checkpoint"
    failures: Failures = Failures()
    units: int = 0
    """Of the run's data set; each push has one. 0 for none."""
    cores: int | None = None
    """That all threads share; None where each has one of its own."""
    is_inline: bool = False
    """Whether shards are so small that event loops update them, and hand nothing over."""
    seed: int = 0

    @property
    def loop_more(self) -> float:
        """What a push costs each event loop for its size, beside what it costs for each byte, in seconds."""
        body, answer = (self.parameters * each / self.shards for each in (self.pushed_bytes, self.pulled_bytes))
        costs = self.costs
        return (
            (0.0 if self.is_inline else costs.loop_hand_over)
            + (costs.loop_long_body if body > Bounds.small_bytes else 0.0)
            + (costs.loop_long_answer if answer > SHORT else 0.0)
        )

    @property
    def is_one_call(self) -> bool:
        """Whether claim and body of a push go to Redis in one call, as in runs/pushes.py."""
        is_plain = self.shards == 1 and not self.units
        return self.is_inline and is_plain and not Policy.of(self.spec().aggregation).slack

    def spec(self) -> RunSpec:
        """The run's, as a client would create it."""
        return RunSpec.model_validate(
            {
                "optimizer": {"algorithm": "adamw_schedule_free"},
                "aggregation": dict(self.aggregation),
                # Redis does not know the parameters, and the simulation counts them apart.
                "parameters": [{"name": "w", "shape": [1]}],
                "durability": self.durability,
            }
        )
