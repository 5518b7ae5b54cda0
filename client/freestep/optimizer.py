"""RemoteOptimizer: a `torch.optim.Optimizer` whose step happens at the service."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from freestep.client import Client, Pulled, worker_name
from freestep.encoders import Encoder, Int8, TopK
from freestep.encoding import ENCODINGS
from freestep.errors import (
    AlreadyInitialized,
    EpochChanged,
    EvalMode,
    FreestepError,
    LeaseExpired,
    ManifestMismatch,
    RunExists,
    RunNotInitialized,
    StepNotReached,
)
from freestep.flat import Flat
from freestep.groups import complete, named, run_spec, trainable
from freestep.lease import HeldLease
from freestep.manifest import Manifest
from freestep.models import AggregationSpec, Dtype, Lease, Point, PointDtype, Receipt, RunSpec
from freestep.ranks import Batch, ranks_of

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
        256. topk: of each tensor the `topk_fraction` of largest magnitude, of push_dtype, and where they are; it suits
        SGD, and slows AdamW down. What int8 and topk leave out is the residual, which is pushed with the next
        gradients. A push that is dropped leaves it as it was; a run that goes back to an earlier step takes it away;
        another number of shards does not matter to it. `state_dict` has it.
    process_group: a torch.distributed group whose ranks are one worker together, or True for all of torchrun's. It
        must carry tensors of the host, as gloo does. Each rank makes every call, with a batch of its own: the
        gradient that is pushed is the mean over ranks, weighted by `samples` where all give them. What fails on one
        rank is raised on all.

    The worker keeps two vectors beside its model and gradients: one that gradients are sent from, and one that
    parameters arrive in; and two more for the residual, before and after a push, where there is one. Raises
    ManifestMismatch, InvalidSpec and whatever the calls of `Client` raise.
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
        process_group: ProcessGroup | Literal[True] | None = None,
        **hyperparameters: Any,
    ) -> None:
        self._ranks = ranks_of(process_group)
        with self._ranks.together():
            given = complete(algorithm, hyperparameters)
            self._sealed = False
            super().__init__(trainable(params), given)
            self._sealed = True
            self._tensors = {name: tensor for name, tensor, _ in named(self.param_groups)}
            options = {
                "aggregation": {"policy": aggregation} if isinstance(aggregation, str) else aggregation,
                "shards": shards,
                "lease_ttl_ms": lease_ttl_ms,
                "durability": durability,
            }
            wanted = run_spec(self.param_groups, algorithm, given, options)
            manifest = Manifest(wanted.parameters)
            pinned = any(tensor.is_cuda for tensor in self._tensors.values())
            self._encoder = None
            if push_dtype is not None and push_dtype not in get_args(Dtype):
                choices = ", ".join(get_args(Dtype))
                raise FreestepError(f"push_dtype is one of {choices}, not {push_dtype!r}; push_encoding may be 'int8'")
            if push_encoding == "dense":
                self._gradient = Flat(manifest, push_dtype or "F32", pinned=pinned)
            else:
                self._gradient = Flat(manifest, pinned=pinned)
                self._encoder = _encoder(self._gradient, push_encoding, push_dtype, topk_fraction)
            self._arriving = Flat(manifest, pull_dtype or "F32", pinned=pinned)
        self.worker = self._ranks.first(lambda: worker or os.environ.get("FREESTEP_WORKER") or worker_name())
        self.receipt: Receipt | None = None
        """What became of the last push."""
        self.pulled: Pulled | None = None
        """Which epoch and step of y the model holds; None while it holds x."""
        self._newest: Pulled | None = None
        own_client = client is None
        self._client = client or Client(url, token=token)
        self._run = self._client.run(run, ranks=self._ranks)
        self._held: list[HeldLease] = []
        # Without a reference to self, so that leases end with the optimizer and, at the latest, with the process.
        self._finalizer = weakref.finalize(self, _close, self._held, self._client if own_client else None)
        try:
            self.spec = self._create(wanted)
            self._join()
        except BaseException:
            self.close()
            raise

    # Joining

    def _create(self, wanted: RunSpec) -> RunSpec:
        spec = self._ranks.first(lambda: self._create_or_find(wanted))
        with self._ranks.together():
            if wanted.parameters != spec.parameters:
                pairs = zip_longest(wanted.parameters, spec.parameters)
                ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
                raise ManifestMismatch(f"the run {self._run.name!r} has other parameters: {theirs}, and here {ours}")
        return spec

    def _create_or_find(self, wanted: RunSpec) -> RunSpec:
        try:
            return self._run.create(wanted).spec
        except RunExists:
            spec = self._run.status().spec
        # Into how many shards it is cut is the run's own affair.
        if spec.parameters == wanted.parameters and spec != wanted.model_copy(update={"shards": spec.shards}):
            logger.warning(
                "the run %s exists with another spec, which is used instead of the one given", self._run.name
            )
        return spec

    def _join(self) -> None:
        """Takes a lease and the run's y; gives the run this model's weights if it has none."""
        while True:
            self._take_lease()
            try:
                self._load("y")
                return
            except RunNotInitialized:
                self._initialize()

    def _take_lease(self) -> None:
        self._granted = self._ranks.first(self._exchange_lease)

    def _exchange_lease(self) -> Lease:
        while self._held:
            self._held.pop().release()
        self._held.append(self._run.lease(self.worker))
        return self._held[0].granted

    def _initialize(self) -> None:
        self._ranks.first(self._give_weights)

    def _give_weights(self) -> None:
        weights = next((flat for flat in (self._gradient, self._arriving) if flat.dtype == "F32"), None)
        weights = weights or Flat(self._gradient.manifest)
        weights.fill(self._tensors)
        try:
            self._run.initialize(weights)
        except AlreadyInitialized:
            logger.debug("another worker gave the run %s its weights first", self._run.name)

    # Training

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: float | Tensor | None = None,
        samples: float | None = None,
    ) -> float | None:
        """Pushes the gradients, loads the fresh y, and leaves the push's receipt in `receipt`.

        loss: the batch's training loss, reported to the service. samples: the batch's size, the weight of this
        gradient in a group's mean. Parameters without a gradient push zeros.

        Under the policies sync and quorum this returns when the update that the push is part of is applied. A push
        that the run no longer takes (it was restored to an earlier step, say) is dropped, and its receipt says
        why. Raises EvalMode while the model holds x, NonFiniteGradient, and whatever the calls of `Client` raise.
        """
        result: float | None = None

        def prepare() -> Batch:
            nonlocal result
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
            self._gather()
            reported = result if loss is None else loss
            return Batch(
                None if samples is None else float(samples),
                None if reported is None else float(reported),
            )

        batch = self._ranks.mean(self._gradient, self._ranks.every(prepare))
        if self._encoder is not None:
            self._encoder.begin()
        assert self.pulled is not None
        self._push(self.pulled, batch)
        return result

    def _gather(self) -> None:
        if self.pulled is None:
            raise EvalMode("the model holds x; call train() before step()")
        self._gradient.gather({name: tensor.grad for name, tensor in self._tensors.items()})

    def _push(self, taken_at: Pulled, batch: Batch) -> None:
        waits = _WAIT_S if self.spec.aggregation.policy in ("sync", "quorum") else 0.0
        while True:
            claim = self._ranks.first(
                lambda: self._held[0].claim(taken_at.step, samples=batch.samples, loss=batch.loss)
            )
            try:
                self.receipt, pulled = self._run.exchange(
                    self._encoder or self._gradient, claim, self._arriving, wait=waits
                )
            except LeaseExpired:
                # Never applied, and never will be under that lease: the gradient is still good in the same epoch.
                self._take_lease()
                if self._granted.epoch == taken_at.epoch:
                    continue
                self._rejoin("epoch-changed")
            except (EpochChanged, RunNotInitialized) as error:
                self._rejoin(error.slug)
            else:
                self._scatter(pulled)
                if waits and (self.receipt.decision == "accumulated" or self.receipt.reason == "duplicate-worker"):
                    self._await_update(self.receipt.step + 1)
            return

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
                if self._ranks.first(lambda: self._held[0].lost is not None):
                    self._rejoin("lease-expired")
                    return

    # Points

    @torch.no_grad()
    def eval(self) -> None:
        """Loads x, the average, into the model; buffers are not touched."""
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
        self._scatter(self._run.pull_into(self._arriving, point, min_step=min_step, wait=wait))

    def _scatter(self, pulled: Pulled) -> None:
        self._arriving.scatter(self._tensors)
        newest = self._newest
        if self._encoder is not None and newest and pulled.epoch != newest.epoch and pulled.step < newest.step:
            # The run forgot the pushes that the residual is of; what made it go back may have been their fault.
            self._encoder.forget()
        self.pulled = self._newest = pulled

    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is made: a run's parameters do not change."""
        if self._sealed:
            raise FreestepError("a run's parameters are fixed when it is created")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The param groups, and under `freestep` what names the run, and the residual of an encoding.

        The optimizer's state is the service's.
        """
        place: dict[str, Any] = {"run": self._run.name, "worker": self.worker}
        if self._encoder is not None:
            assert self._newest is not None
            place["residual"] = self._encoder.residual.clone()
            place["residual_at"] = (self._newest.epoch, self._newest.step)
        return {**super().state_dict(), "freestep": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back the worker's name and the residual, and joins the run again, at its newest y.

        A state without a residual, or one that is loaded for another kind of pushes, leaves none. Raises
        ManifestMismatch when the state is of another run.
        """
        with self._ranks.together():
            place = state_dict.get("freestep", {})
            if place.get("run") != self._run.name:
                raise ManifestMismatch(f"the state is of the run {place.get('run')!r}, not of {self._run.name!r}")
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "freestep"})
            if self._encoder is not None:
                self._encoder.forget()
                if "residual" in place:
                    self._encoder.residual = place["residual"]
                    self._newest = Pulled(*place["residual_at"])
            self.worker = place["worker"]
        self._join()

    def close(self) -> None:
        """Releases the lease. The model keeps what it holds."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _encoder(gradient: Flat, name: str, dtype: str | None, fraction: float) -> Encoder:
    if name == "int8":
        if dtype is not None:
            raise FreestepError(f"push_encoding='int8' leaves no choice of push_dtype, which is {dtype!r}")
        return Int8(gradient)
    if name == "topk":
        return TopK(gradient, fraction, dtype or "F32")
    raise FreestepError(f"push_encoding is one of {', '.join(ENCODINGS)}, not {name!r}")


def _close(held: list[HeldLease], client: Client | None) -> None:
    while held:
        held.pop().release()
    if client is not None:
        client.close()
