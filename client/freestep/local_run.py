"""A run in this process, without a service: the calls of `Run` that optimizers make, on the service's own arithmetic.

Gradients and points are the same bodies as over HTTP, and a shard of the service applies the same log entries. There is
one worker, and nothing is kept: the run ends with its optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from math import isfinite
from typing import Any

from freestep.answers import Pulled
from freestep.api.models import Lease, Point, Receipt, RunSpec, RunStatus, WorkerStatus
from freestep.encoders import Encoder
from freestep.errors import (
    FreestepError,
    InvalidSpec,
    MalformedRequest,
    ManifestMismatch,
    RunNotFound,
    RunNotInitialized,
    StepNotReached,
)
from freestep.flat import Flat
from freestep.in_place_gradient import InPlaceGradient
from freestep.lease import Claim
from freestep.run_state import RunState
from freestep.tensor_transfer import Exchange
from freestep.wire.encoding import ENCODINGS
from freestep.wire.manifest import Manifest
from freestep.wire.receiver import Receiver, lay
from freestep_service.domain.aggregation import ADAPTIVE, LIVE, NONE, Policy
from freestep_service.state.bodies import body, copy_point, room
from freestep_service.state.buffers import Vector
from freestep_service.state.compute import HOST
from freestep_service.state.decode import decode_and_measure
from freestep_service.state.push_entry import push_entry, require_usable
from freestep_service.state.shard import Shard, StateCopy

__all__ = ["LocalLease", "LocalRun"]

_FEWEST_SAMPLES, _MOST_SAMPLES = 1e-12, 1e12
"""As a service takes."""
_SAVED = [field.name for field in fields(StateCopy) if field.name not in ("control", "data", "norm_history", "tally")]
"""What of a copy is the run's state: numbers, texts and tensors, which torch loads with weights_only. Norms are for
robust rules, which compare workers, and units of data sets are handed out by services only,
and so are changes of a run while it trains."""


class LocalLease:
    """The lease of a local run's only worker, which nobody can take; its members are those of HeldLease."""

    lost: FreestepError | None = None

    def __init__(self, granted: Lease) -> None:
        self.granted = granted

    def claim(
        self,
        step: int,
        *,
        samples: float | None = None,
        loss: float | None = None,
        speed: float | None = None,
        units: Mapping[str, Sequence[int]] | None = None,
    ) -> Claim:
        """As HeldLease's."""
        return Claim(self.granted.lease, self.granted.token, step, samples, loss, speed, units or {})

    def release(self) -> None:
        """Does nothing."""


class LocalRun:
    """A run that one optimizer alone pushes to; its methods are those of Run, and it has one shard.

    `create` comes first. Not safe to use from several threads.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_created = False
        self._worker: WorkerStatus | None = None
        self._pushes = Counter({"applied": 0, "accumulated": 0, "dropped": 0})
        self._last: tuple[str, Receipt] | None = None
        """The key and the receipt of the last push."""

    def create(self, spec: RunSpec) -> RunStatus:
        """Creates the run. Raises InvalidSpec where the policy waits for other workers."""
        self._policy = Policy.of(spec.aggregation)
        if spec.aggregation.robust != "none":
            raise InvalidSpec(
                f"robust {spec.aggregation.robust!r} compares workers, and a run with url='local' has one",
                field="aggregation.robust",
            )
        if self._policy.distinct and self._policy.batch not in (LIVE, "1"):
            raise InvalidSpec(
                f"an update of the policy {spec.aggregation.policy!r} needs {self._policy.batch} workers, and a run "
                "with url='local' has one",
                field="aggregation.batch",
            )
        self._spec, self._manifest = spec, Manifest.of(spec)
        self._shard = Shard(spec, self._manifest, HOST)
        self._is_created = True
        self._vector = Vector(self._manifest.numel, room(self._manifest))
        """Bodies are received in it and sent from it."""
        return self.status()

    def status(self) -> RunStatus:
        """The run's state. Raises RunNotFound before `create`."""
        if not self._is_created:
            raise RunNotFound(f"there is no run {self.name!r}")
        return RunStatus(
            run=self.name,
            epoch=self._shard.epoch,
            step=self._shard.step,
            initialized=self._is_initialized,
            spec=self._spec,
            workers=self.workers(),
            pushes=dict(self._pushes),
            scheduled_lr=dict(zip(self._spec.group_names(), self._shard.scheduled_lr or (), strict=False)),
            parameter_count=self._manifest.numel,
        )

    def workers(self, lease: str | None = None) -> list[WorkerStatus]:
        """The one worker, once it has a lease, which is shown whoever asks."""
        return [] if self._worker is None else [self._worker]

    def lease(self, worker: str) -> LocalLease:
        """A lease for the one worker."""
        granted = Lease(
            lease="local",
            token=1,
            worker=worker,
            ttl_ms=self._spec.lease_ttl_ms,
            epoch=self._shard.epoch,
            step=self._shard.step,
        )
        self._worker = WorkerStatus(expires_in_ms=granted.ttl_ms, **granted.model_dump(exclude={"epoch", "step"}))
        return LocalLease(granted)

    def initialize(self, weights: Flat) -> None:
        """Takes the initial weights."""
        self._shard.initialize(weights.vector, epoch=1)

    @property
    def _is_initialized(self) -> bool:
        return self._shard.epoch > 0

    def exchange(
        self, gradient: Flat | InPlaceGradient | Encoder, claim: Claim, into: Flat, *, wait: float = 0.0
    ) -> tuple[Receipt, Pulled]:
        """Applies a gradient, and writes y into a flat vector."""
        encoder = gradient if isinstance(gradient, Encoder) else None
        try:
            receipt = self._push(gradient, claim)
        except FreestepError:
            if encoder is not None:
                encoder.settle(False)
            raise
        if encoder is not None:
            encoder.settle(receipt.decision != "dropped")
        return receipt, self.pull_into(into, "y")

    def begin_exchange(
        self, gradient: Flat | InPlaceGradient | Encoder, claim: Claim, into: Flat, *, wait: float = 0.0
    ) -> Exchange:
        """Makes an exchange at once, whose outcome is given later."""
        outcome: Future[tuple[Receipt, Pulled]] = Future()
        try:
            outcome.set_result(self.exchange(gradient, claim, into, wait=wait))
        except Exception as error:
            outcome.set_exception(error)
        return Exchange(outcome.result, lambda: None)

    def pull_into(self, into: Flat, point: Point = "x", *, min_step: int = 0, wait: float = 0.0) -> Pulled:
        """Writes a point into a flat vector, in the dtype in which that receives bodies."""
        shard = self._shard
        if not self._is_initialized:
            raise RunNotInitialized(f"the run {self.name!r} has no weights yet")
        if shard.step < min_step:
            raise StepNotReached(f"the run {self.name!r} is at step {shard.step}, before step {min_step}")
        copy_point(shard, point, self._vector, into.arrives)
        pieces = body(self._vector, self._manifest, into.arrives, self.name, shard.epoch, shard.step, point)
        receiver = into.receiver(_size(pieces))
        for piece in pieces:
            lay(receiver, piece)
        into.decode(receiver)
        return Pulled(shard.epoch, shard.step, point, shard.scheduled_lr)

    # Pushes

    def _push(self, gradient: Flat | InPlaceGradient | Encoder, claim: Claim) -> Receipt:
        if self._last is not None and self._last[0] == claim.key:
            return self._last[1].model_copy(update={"replayed": True})
        receipt = self._decided(gradient, claim)
        self._last = claim.key, receipt
        self._pushes[receipt.decision] += 1
        assert self._worker is not None
        self._worker = self._worker.model_copy(
            update={
                "pushes": self._worker.pushes + 1,
                "step": claim.step,
                "staleness": receipt.staleness,
                "speed": claim.speed,
            }
        )
        return receipt

    def _decided(self, gradient: Flat | InPlaceGradient | Encoder, claim: Claim) -> Receipt:
        shard, spec = self._shard, self._spec
        if spec.optimizer.needs_loss and claim.loss is None:
            raise InvalidSpec(f"{spec.optimizer.algorithm} needs the loss of each push: step(loss=...)", field="loss")
        if claim.loss is not None and not isfinite(claim.loss):
            raise MalformedRequest(f"the loss must be finite, and is {claim.loss}")
        if claim.samples is not None and not _FEWEST_SAMPLES <= claim.samples <= _MOST_SAMPLES:
            raise MalformedRequest(f"samples must be from {_FEWEST_SAMPLES:g} to {_MOST_SAMPLES:g}: {claim.samples}")
        staleness = shard.step - claim.step
        if staleness > self._max_staleness:
            return Receipt(decision="dropped", reason="stale", step=shard.step, staleness=staleness)
        (part,) = gradient.parts(1)
        pieces = part.body()
        receiver = Receiver(self._manifest, self._vector.bytes, _size(pieces), encodings=ENCODINGS)
        for piece in pieces:
            lay(receiver, piece)
        pushed, norm = decode_and_measure(self._vector, self._manifest, receiver)
        advance = sum(shard.group.values()) + 1 >= self._batch
        entry = push_entry(
            pushed,
            require_usable(spec, norm),
            staleness=staleness,
            live=1,
            samples=claim.samples,
            loss=claim.loss,
            seq=shard.seq + 1,
            epoch=shard.epoch,
            advance=advance,
        )
        shard.apply(entry)
        return Receipt(decision="applied" if advance else "accumulated", step=shard.step, staleness=staleness)

    @property
    def _batch(self) -> int:
        return 1 if self._policy.batch == LIVE else int(self._policy.batch)

    @property
    def _max_staleness(self) -> float:
        bound = self._policy.max_staleness
        return {NONE: float("inf"), ADAPTIVE: 4.0}[bound] if bound in (NONE, ADAPTIVE) else float(bound)

    # State

    def export_state(self) -> RunState:
        """As Run's."""
        cut, slots = self._shard.copy_state(), self._manifest.slots
        buffers = {
            name: {slot.name: vector[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in slots}
            for name, vector in cut.tensors.items()
            if name != "accumulated"
        }
        return RunState(
            self._spec,
            cut.step,
            buffers,
            cut.scalars,
            epoch=cut.epoch,
            expected_staleness=cut.expected_staleness,
        )

    def overwrite(self, weights: Flat) -> None:
        """As Run's: the weights become x, y and z."""
        cut = self._shard.copy_state()
        for name in {"x", "y", "z"} & cut.tensors.keys():
            cut.tensors[name].copy_(weights.vector)
        self._shard.load(cut, self._shard.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """The whole run: its spec, its state vectors, fp32 [numel] each, and its scalars."""
        cut = self._shard.copy_state()
        return {
            "spec": self._spec.model_dump(mode="json"),
            **{name: getattr(cut, name) for name in _SAVED},
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes the state of a local run of the same spec as its own, in a new epoch. Raises ManifestMismatch."""
        if state is None:
            raise ManifestMismatch(
                "the state holds no local run: it is of a service's run, or was not saved by state_dict() itself"
            )
        own = self._spec.model_dump(mode="json")
        differing = [name for name, value in own.items() if name != "shards" and state["spec"].get(name) != value]
        if differing:
            raise ManifestMismatch(f"the state is of a local run with other {' and '.join(differing)}")
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in state["tensors"].items()}
        cut = StateCopy(**{name: state[name] for name in _SAVED} | {"tensors": tensors})
        self._shard.load(cut, max(self._shard.epoch, cut.epoch) + 1)
        self._last = None


def _size(pieces: Iterable[bytes | memoryview]) -> int:
    return sum(memoryview(piece).nbytes for piece in pieces)
