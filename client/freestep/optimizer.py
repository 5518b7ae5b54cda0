"""RemoteOptimizer: a `torch.optim.Optimizer` whose step happens at the service."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from freestep.api.models import AggregationSpec, Dtype, Point, PointDtype, Receipt
from freestep.client import Client, Pulled, worker_name
from freestep.errors import (
    EpochChanged,
    EvalMode,
    FreestepError,
    LeaseExpired,
    ManifestMismatch,
    RunNotInitialized,
    StepNotReached,
)
from freestep.flat import Flat
from freestep.gradients import Gradients, Wire
from freestep.groups import complete, named, run_spec, trainable
from freestep.inflight_push import Flight, refuse_late_gradients
from freestep.lease import HeldLease
from freestep.membership import Membership
from freestep.wire.encoding import Encoding
from freestep.wire.manifest import Manifest
from freestep.worker_group import Batch, ranks_of

__all__ = ["RemoteOptimizer"]

logger = logging.getLogger("freestep")

_WAIT_S = 30.0
"""How long one request waits for a group's update before it is asked again."""


class RemoteOptimizer(torch.optim.Optimizer):
    """Trains a model on a run of a freestep service.

    The first worker creates the run and gives it its model's weights; the others check that their parameters are
    the run's and take over its weights. Each `step` pushes the gradients and loads fresh y, in one round trip. The
    optimizer's state, and so the hyperparameters that count, are the run's: later changes to `param_groups` are not
    sent.

    params: an `nn.Module`, named parameters, parameters, or param groups as for any torch optimizer; a group may
        have a `name`, and hyperparameters of its own. Frozen parameters are left out. Buffers, such as BatchNorm's
        statistics, stay with each worker.
    run: the run's name. url, token: as for `Client`. client: a `Client` of your own instead.
    algorithm, aggregation, hyperparameters: what the run is created with; `aggregation` is a policy's name or an
        aggregation spec. Where the run exists with others, they are the run's, and a warning is logged.
    worker: this worker's name; a second worker of the same name fences off the first.
    shards: how many shards a new run is cut into. A run that exists keeps its own number.
    push_dtype, pull_dtype: F32, BF16 or F16, what gradients and parameters travel as. pull_dtype may also be I8: y and
        x travel as int8 with a scale for each 256 elements, and arrive as fp32. Gradients are then taken beside y, by
        what was rounded off; the run's own parameters stay fp32.
    push_encoding: how gradients travel. dense: all elements, of push_dtype. int8: a byte for each, and a scale for each
        `int8_block`. topk: of each tensor the `topk_fraction` of largest magnitude, of push_dtype, and where they are;
        it suits SGD, and slows AdamW down. What BF16, F16, int8 and topk leave out is the residual, which is pushed
        with the next gradients. A push that is dropped leaves it as it was; a run that goes back to an earlier step
        takes it away; another number of shards does not matter to it. `state_dict` has it.
    error_feedback: False has what BF16 and F16 round off forgotten, as it is anyway where the model is of that dtype
        and nothing is rounded off. int8 and topk are not to be had without.
    process_group: a torch.distributed group whose ranks are one worker together, or True for all of torchrun's. It
        must carry tensors of the host, as gloo does. Each rank makes every call, with a batch of its own: the
        gradient that is pushed is the mean over ranks, weighted by `samples` where all give them. What fails on one
        rank is raised on all. A GradScaler must skip the same steps on all ranks, as torch's ShardedGradScaler does.

    The worker keeps two vectors beside its model and gradients: one that gradients are sent from, of push_dtype, and
    one that parameters arrive in. Where there is a residual the first is fp32, and there are two more of it, before
    and after a push, and the bytes that are sent: for BF16, 14 bytes a parameter instead of 2. fp32 gradients in the
    host's memory that are large are sent from where they lie, so that their part of the first vector is never touched.

    Raises ManifestMismatch, InvalidSpec and whatever the calls of `Client` raise.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        run: str,
        url: str | None = None,
        token: str | None = None,
        client: Client | None = None,
        algorithm: str = "adamw_schedule_free",
        aggregation: str | Mapping[str, Any] | AggregationSpec | None = None,
        worker: str | None = None,
        shards: int | None = None,
        lease_ttl_ms: int | None = None,
        durability: Literal["none", "checkpoint"] | None = None,
        push_dtype: Dtype | None = None,
        pull_dtype: PointDtype | None = None,
        push_encoding: Literal["dense", "int8", "topk"] = "dense",
        topk_fraction: float = 0.01,
        int8_block: int = Encoding.block,
        error_feedback: bool = True,
        process_group: ProcessGroup | Literal[True] | None = None,
        **hyperparameters: Any,
    ) -> None:
        self._ranks = ranks_of(process_group)
        with self._ranks.together():
            given = complete(algorithm, hyperparameters)
            self._sealed = False
            kept, frozen = trainable(params)
            super().__init__(kept, given)
            self._sealed = True
            self._tensors = {name: tensor for name, tensor, _ in named(self.param_groups)}
            options = {
                "aggregation": {"policy": aggregation} if isinstance(aggregation, str) else aggregation,
                "shards": shards,
                "lease_ttl_ms": lease_ttl_ms,
                "durability": durability,
            }
            wanted = run_spec(self.param_groups, algorithm, given, options)
            manifest = Manifest.of(wanted)
            pinned = any(tensor.is_cuda for tensor in self._tensors.values())
            wire = Wire(
                push_dtype,
                push_encoding,
                topk_fraction=topk_fraction,
                int8_block=int8_block,
                error_feedback=error_feedback,
            )
            self._gradients = Gradients(self._tensors, frozen, manifest, wire, self._ranks, pinned=pinned)
            self._arriving = Flat(manifest, pull_dtype or "F32", pinned=pinned)
            self._prepare(frozen)
        worker = self._ranks.first(lambda: worker or os.environ.get("FREESTEP_WORKER") or worker_name())
        self.receipt: Receipt | None = None
        """What became of the last push that has been answered."""
        self.pulled: Pulled | None = None
        """Which epoch and step of y the model holds; None while it holds x."""
        self._newest: Pulled | None = None
        self._flight: Flight | None = None
        own_client = client is None
        self._client = client or Client(url, token=token)
        self._run = self._client.run(run, ranks=self._ranks)
        held: list[HeldLease] = []
        # Without a reference to self, so that leases end with the optimizer and, at the latest, with the process.
        self._finalizer = weakref.finalize(self, _close, held, self._client if own_client else None)
        self._membership = Membership(self._run, worker, self._ranks, held)
        try:
            self.spec = self._membership.create(wanted)
            self._join()
        except BaseException:
            self.close()
            raise

    @property
    def worker(self) -> str:
        """The worker's name."""
        return self._membership.worker

    def _prepare(self, frozen: Sequence[tuple[str, Tensor]]) -> None:
        """Has ready what is needed before the run is joined; `frozen` are the parameters that were left out."""

    def _join(self) -> None:
        """Takes a lease and the run's y; gives the run this model's weights if it has none."""
        while True:
            self._membership.take_lease()
            try:
                self._load("y")
                return
            except RunNotInitialized:
                weights = next((flat for flat in (self._arriving, self._gradients.flat) if flat.dtype == "F32"), None)
                weights = weights or Flat(self._arriving.manifest)
                weights.fill(self._tensors)
                self._membership.initialize(weights)

    # Training

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: float | Tensor | None = None,
        samples: float | None = None,
        overlap: bool = False,
    ) -> float | None:
        """Pushes the gradients, loads the fresh y, and leaves the push's receipt in `receipt`.

        loss: the batch's training loss, reported to the service. samples: the batch's size, the weight of this
        gradient in a group's mean. Parameters without a gradient push zeros. Returns the closure's loss, if there is
        a closure.

        overlap: returns at once, while the push travels. The gradients are copied before, so that `zero_grad` and
        the next batch may do with them as they like. The next `step`, with or without overlap, first receives the
        answer and loads the y that came with it; `receipt` is then that of the push before this one. So gradients
        are one step staler than without. `flush`, `eval`, `state_dict`, `load_state_dict` and `close` wait for the
        answer too. What the push fails with is raised there, and by `step` before it pushes anything: the new
        gradients are where they were. A push that was refused is over then. One of which nothing is known (the service
        was away for too long, say) stays in flight: the next of these calls sends it again, under the key that makes
        it count once. If its run has gone back to an earlier step, the gradients that were to follow it are of no
        use either, and are dropped as it is.

        Under the policies sync and quorum this returns when the update that the push is part of is applied. A push
        that the run no longer takes (it was restored to an earlier step, say) is dropped, and its receipt says
        why. Raises EvalMode while the model holds x, ManifestMismatch when parameters of the run have been frozen, or
        frozen ones have a gradient, NonFiniteGradient, and whatever the calls of `Client` raise; and ValueError for
        `overlap` under a policy whose max_staleness is 0, which would drop every second push.
        """
        if overlap:
            refuse_late_gradients(self.spec.aggregation)
        taken_at, result = self.pulled, None

        def evaluate() -> None:
            nonlocal closure, result
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
                closure = None

        def prepare() -> Batch:
            evaluate()
            if taken_at is None:
                raise EvalMode("the model holds x; call train() before step()")
            self._gradients.gather(copy=overlap)
            reported = result if loss is None else loss
            return Batch(
                None if samples is None else float(samples),
                None if reported is None else float(reported),
            )

        if self._flight is not None:
            # What a closure computes is computed while the push travels, as what its caller does otherwise.
            self._ranks.every(evaluate)
            self.flush()
        batch = self._gradients.mean(self._ranks.every(prepare))
        assert taken_at is not None
        self._push(taken_at, batch, overlap)
        return result

    def _push(self, taken_at: Pulled, batch: Batch, overlap: bool) -> None:
        if taken_at.epoch < self._membership.granted.epoch:
            # The push before, which was in flight, found the run in a new epoch.
            self._rejoin("epoch-changed")
            return
        flight = Flight(taken_at, batch, self._membership.claim(taken_at, batch))
        if overlap:
            flight.begin(self._run.begin_exchange(self._gradients.body, flight.claim, self._arriving, wait=self._waits))
            self._flight = flight
        else:
            self._land(flight)

    @torch.no_grad()
    def flush(self) -> None:
        """Waits for the answer to a push in flight, if there is one, and loads its y. Raises what the push fails with.

        As every other call, it is made by all ranks of a group.
        """
        if self._flight is not None:
            try:
                self._land(self._flight)
            except Exception as error:
                if not self._flight.failed(error):
                    self._flight = None
                raise
            self._flight = None

    def _land(self, flight: Flight) -> None:
        """Receives the answer to a push, which is made again where that is of use, and loads its y."""
        while True:
            exchange = partial(self._run.exchange, self._gradients.body, flight.claim, self._arriving, wait=self._waits)
            try:
                self.receipt, pulled = flight.answer(exchange)
            except LeaseExpired:
                # Never applied, and never will be under that lease: the gradient is still good in the same epoch.
                self._membership.take_lease()
                if self._membership.granted.epoch == flight.taken_at.epoch:
                    flight.renew(self._membership.claim(flight.taken_at, flight.batch))
                    continue
                self._rejoin("epoch-changed")
            except (EpochChanged, RunNotInitialized) as error:
                self._rejoin(error.slug)
            else:
                self._scatter(pulled)
                if self._waits and (
                    self.receipt.decision == "accumulated" or self.receipt.reason == "duplicate-worker"
                ):
                    self._await_update(self.receipt.step + 1)
            return

    @property
    def _waits(self) -> float:
        return _WAIT_S if self.spec.aggregation.policy in ("sync", "quorum") else 0.0

    def _rejoin(self, reason: str) -> None:
        logger.warning("the run %s no longer takes this push (%s); joining it again", self._run.name, reason)
        self._join()
        assert self.pulled is not None
        self.receipt = Receipt(decision="dropped", reason=reason, step=self.pulled.step, staleness=0)

    def _await_update(self, step: int) -> None:
        while True:
            try:
                self._load("y", min_step=step)
                return
            except StepNotReached:
                if self._membership.is_lost():
                    self._rejoin("lease-expired")
                    return

    # Points

    @torch.no_grad()
    def eval(self) -> None:
        """Loads x, the average, into the model; buffers are not touched."""
        self.flush()
        if self.pulled is not None:
            self._load("x")
            self.pulled = None

    @torch.no_grad()
    def train(self) -> None:
        """Loads y, where gradients are taken, into the model."""
        if self.pulled is None:
            self._load("y")

    def _load(self, point: Point, *, min_step: int = 0) -> None:
        wait = _WAIT_S if min_step else 0.0
        self._scatter(self._run.pull_into(self._arriving, point, min_step=min_step, wait=wait), point)

    def _scatter(self, pulled: Pulled, point: Point = "y") -> None:
        self._place(pulled, point)
        newest = self._newest
        encoder = self._gradients.encoder
        if encoder is not None and newest and pulled.epoch != newest.epoch and pulled.step < newest.step:
            # The run forgot the pushes that the residual is of; what made it go back may have been their fault.
            encoder.forget()
        self.pulled = self._newest = pulled

    def _place(self, pulled: Pulled, point: Point) -> None:
        """Has the model hold the point that has arrived."""
        self._arriving.scatter(self._tensors)

    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is made: a run's parameters do not change."""
        if self._sealed:
            raise FreestepError("a run's parameters are fixed when it is created")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The param groups, and under `freestep` what names the run, and the residual of an encoding.

        The optimizer's state is the service's. A push in flight is waited for, as by `flush`.
        """
        self.flush()
        place: dict[str, Any] = {"run": self._run.name, "worker": self.worker}
        if self._gradients.encoder is not None:
            assert self._newest is not None
            place["residual"] = self._gradients.encoder.residual.clone()
            place["residual_at"] = (self._newest.epoch, self._newest.step)
        return {**super().state_dict(), "freestep": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back the worker's name and the residual, and joins the run again, at its newest y.

        A state without a residual, or one that is loaded for another kind of pushes, leaves none. Raises
        ManifestMismatch when the state is of another run.
        """
        self.flush()
        with self._ranks.together():
            place = state_dict.get("freestep", {})
            if place.get("run") != self._run.name:
                raise ManifestMismatch(f"the state is of the run {place.get('run')!r}, not of {self._run.name!r}")
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "freestep"})
            if (encoder := self._gradients.encoder) is not None:
                encoder.forget()
                if "residual" in place:
                    encoder.residual = place["residual"]
                    self._newest = Pulled(*place["residual_at"])
            self._membership.worker = place["worker"]
        self._join()

    def close(self) -> None:
        """Waits for a push in flight, as `flush` does, and releases the lease. The model keeps what it holds."""
        try:
            self.flush()
        finally:
            self._flight = None
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the optimizer. Where an error ends the block, a push in flight is not waited for nor made again."""
        if error is not None and self._flight is not None:
            self._flight.abandon()
            self._flight = None
        self.close()


def _close(held: list[HeldLease], client: Client | None) -> None:
    while held:
        held.pop().release()
    if client is not None:
        client.close()
