"""RemoteOptimizer: a `torch.optim.Optimizer` whose steps are taken by the service."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from freestep.answers import Pulled
from freestep.api.models import AggregationSpec, Dtype, Point, PointDtype, Receipt
from freestep.client import Client
from freestep.errors import (
    Closed,
    EpochChanged,
    EvalMode,
    FreestepError,
    LeaseExpired,
    ManifestMismatch,
    RunNotInitialized,
    StepNotReached,
)
from freestep.flat import Flat
from freestep.gradients import Gradients, PushFormat
from freestep.groups import check_groups, complete_hyperparameters, named_tensors, run_spec, split_frozen
from freestep.inflight_push import InflightPush, require_stale_gradients_accepted
from freestep.lease import HeldLease, worker_name
from freestep.membership import Membership
from freestep.process_group import worker_group
from freestep.wire.encoding import Encoding
from freestep.wire.manifest import Manifest
from freestep.worker_group import Batch

__all__ = ["RemoteOptimizer"]

logger = logging.getLogger("freestep")

_WAIT_S = 30.0
"""Seconds for which one request waits for the update of a group of pushes."""


class RemoteOptimizer(torch.optim.Optimizer):
    """Trains a model on a run of a freestep service.

    The first worker creates the run and uploads its model's weights; later ones check that their parameters are the
    run's, and load its weights. Each `step` pushes the gradients and loads fresh y, in one round trip. The optimizer's
    state belongs to the run, and so do the hyperparameters: later changes to `param_groups` have no effect.

    Gradients are taken at y, which the model contains from the start and after `train`; `eval` loads x, the average.
    Attributes: `receipt`, the Receipt of the last push that was answered, or None; `pulled`, the epoch and step
    (Pulled) of the y that the model contains, None while it contains x; `spec`, the run's RunSpec.

    The worker keeps two vectors beside its model and gradients, in host memory: one that gradients are sent from, of
    push_dtype, and one that parameters arrive in, of pull_dtype. With error feedback it keeps the gradient as fp32, the
    residual before and after a push, and the encoded bytes: 14 bytes a parameter for BF16, instead of 2. Large fp32
    gradients in host memory are sent without a copy.

    Not safe to use from several threads. Use it as a context manager, or call `close`.

    Example:
        >>> with freestep.RemoteOptimizer(model, url="http://127.0.0.1:8000", run="mnist", lr=2.5e-3) as opt:
        ...     for inputs, targets in loader:
        ...         opt.zero_grad()
        ...         loss = loss_fn(model(inputs), targets)
        ...         loss.backward()
        ...         opt.step(loss=loss.detach(), samples=len(inputs))
        ...     opt.eval()

    Args:
        params: An `nn.Module`, named parameters, parameters, or param groups as for any torch optimizer; a group may
            have a `name` and hyperparameters of its own. Parameters may be on any device and of any float dtype: the
            run keeps fp32 masters. Frozen parameters are left out. Buffers, such as BatchNorm's statistics, are not
            part of the run.
        run: The run's name.
        url: The service's URL, as for `Client`.
        token: A bearer token, as for `Client`.
        client: A client to use instead of one made of `url` and `token`; it is not closed.
        algorithm: The algorithm that the run is created with: `adamw_schedule_free`, `sgd_schedule_free`,
            `radam_schedule_free`, `schedule_free_wrapper`, `adamc_schedule_free_plus`, `gpa_adamw`, `gpa_sgd`,
            `diloco`, `sgd` or `adamw`. If the run exists with another spec, that is used, and a warning is logged.
        aggregation: The policy that the run is created with: a policy's name, or an AggregationSpec or its document.
            None is `ringmaster`, which drops gradients that are too stale.
        worker: This worker's name; None takes FREESTEP_WORKER from the environment, or a unique name. An older worker
            of the same name loses its lease.
        shards: The number of shards that the run is created with, 1 to 256; None is 1. An existing run keeps its own.
        lease_ttl_ms: Milliseconds after which a worker that does not answer counts as gone, 100 to 3,600,000; None is
            30,000.
        durability: "none" or "checkpoint", which is the default: after a crash the run returns to its last checkpoint.
        push_dtype: "F32", "BF16" or "F16", the dtype in which gradients are sent; None is "F32".
        pull_dtype: "F32", "BF16", "F16" or "I8", the dtype in which parameters are received; None is "F32". With "F16",
            a value beyond 65504 is refused (DtypeOverflow). With "I8",
            y and x are sent as int8 with a scale for each 256 elements and arrive as fp32, so that gradients are taken
            beside y by the rounding error; the run itself stays fp32.
        push_encoding: "dense": all elements in push_dtype. "int8": a byte for each element, and a scale for each
            `int8_block`. "topk": the `topk_fraction` of largest magnitude of each tensor, in push_dtype, with their
            indices; suited to SGD, and slower with AdamW.
        topk_fraction: The fraction of each tensor's elements that "topk" sends, above 0 and at most 1.
        int8_block: How many elements share a scale under "int8".
        error_feedback: Adds what an encoding left out of one push (the residual) to the next. A push that is dropped
            does not change the residual; it is set to zero when the run goes back to an earlier step, and is part of
            `state_dict`. False forgets what BF16 and F16 round off; int8 and topk require True.
        process_group: A torch.distributed group whose ranks are one worker together, or True for the default group; its
            backend must have collectives for CPU tensors, as gloo does. Every rank makes every call, with a batch of
            its own; the gradient that is pushed is the mean over ranks, weighted by `samples` if all give them. An
            error on one rank is raised on all. A GradScaler must skip the same steps on all ranks, as torch's
            ShardedGradScaler does.
        **hyperparameters: The algorithm's hyperparameters, with the defaults of its class in
            `freestep.api.hyperparameters`.

    Raises:
        ManifestMismatch: The run exists with other parameters.
        InvalidSpec: The algorithm, a hyperparameter or the aggregation is not valid.
        FreestepError: The dtypes and encodings do not go together.
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
        self._worker_group = worker_group(process_group)
        with self._worker_group.raise_on_all():
            given = complete_hyperparameters(algorithm, hyperparameters)
            self._has_all_groups = False
            kept, frozen = split_frozen(params)
            check_groups(kept, given)
            super().__init__(kept, given)
            self._has_all_groups = True
            self._rates: list[Any] | None = [group.get("lr") for group in self.param_groups]
            """The groups' learning rates as they were given; None once a change has been warned about."""
            self._tensors = {name: tensor for name, tensor, _ in named_tensors(self.param_groups)}
            options = {
                "aggregation": {"policy": aggregation} if isinstance(aggregation, str) else aggregation,
                "shards": shards,
                "lease_ttl_ms": lease_ttl_ms,
                "durability": durability,
            }
            wanted = run_spec(self.param_groups, algorithm, given, options)
            manifest = Manifest.of(wanted)
            pinned = any(tensor.is_cuda for tensor in self._tensors.values())
            push_format = PushFormat(
                push_dtype,
                push_encoding,
                topk_fraction=topk_fraction,
                int8_block=int8_block,
                error_feedback=error_feedback,
            )
            self._gradients = Gradients(self._tensors, frozen, manifest, push_format, self._worker_group, pinned=pinned)
            self._receive_buffer = Flat(manifest, pull_dtype or "F32", pinned=pinned)
            self._prepare(frozen)
        worker = self._worker_group.run_on_first(lambda: worker or os.environ.get("FREESTEP_WORKER") or worker_name())
        self.receipt: Receipt | None = None
        """The receipt of the last push that was answered."""
        self.pulled: Pulled | None = None
        """The epoch and step of the y that the model contains; None while it contains x."""
        self._newest: Pulled | None = None
        self._step = torch.zeros((), dtype=torch.float32, device="cpu")
        """The newest step, which every parameter's state has: torch takes an optimizer whose state is empty for new."""
        self._inflight: InflightPush | None = None
        own_client = client is None
        self._client = client or Client(url, token=token)
        self._run = self._client.run(run, ranks=self._worker_group)
        held: list[HeldLease] = []
        # Has no reference to self, so that the lease ends when the optimizer is collected or the process exits.
        self._finalizer = weakref.finalize(self, _close, held, self._client if own_client else None)
        self._membership = Membership(self._run, worker, self._worker_group, held)
        try:
            self.spec = self._membership.create(wanted)
            self._share_step()
            self._join()
        except BaseException:
            self.close()
            raise

    @property
    def worker(self) -> str:
        """The worker's name."""
        return self._membership.worker

    def _prepare(self, frozen: Sequence[tuple[str, Tensor]]) -> None:
        """Called before the run is joined; `frozen` are the parameters that were left out."""

    def _join(self) -> None:
        """Takes a lease and loads the run's y; uploads this model's weights if the run has none."""
        while True:
            self._membership.take_lease()
            try:
                self._load("y")
                return
            except RunNotInitialized:
                weights = next(
                    (flat for flat in (self._receive_buffer, self._gradients.flat) if flat.dtype == "F32"), None
                )
                weights = weights or Flat(self._receive_buffer.manifest)
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
        allow_empty: bool = False,
    ) -> float | None:
        """Pushes the gradients and loads fresh y; the push's receipt is then in `receipt`.

        Parameters without a gradient push zeros. Under the policies `sync` and `quorum` it returns when the update that
        the push is part of has been applied. A push that the run no longer accepts, since it was restored to an earlier
        step for example, is dropped: the run is joined again at its newest y, and the receipt's reason says why.

        Args:
            closure: Computes the loss and the gradients, and returns the loss.
            loss: The batch's mean training loss, which the run's status shows; None takes the closure's.
            samples: The batch's size, the weight of this gradient in the mean of a group; None weighs 1.
            overlap: Returns at once, while the push is sent in the background; the gradients are copied before. The
                next `step` first waits for the answer and loads the y that came with it, so gradients are one step
                staler, and `receipt` is that of the push before. `flush`, `eval`, `state_dict`, `load_state_dict` and
                `close` wait for it too. The call that waits raises the push's error, and `step` does so before it
                pushes anything. A push that was refused is over then; one whose outcome is unknown stays in flight and
                is sent again by the next of these calls, under the same key, so that it counts once. If the run went
                back to an earlier step, gradients that were to follow that push are dropped too.
            allow_empty: Pushes zeros where no parameter has a gradient: weight decay and averaging go a step on.

        Returns:
            The closure's loss, or None.

        Raises:
            EvalMode: The model contains x; call `train` first.
            ManifestMismatch: A parameter of the run was frozen, or a frozen one has a gradient.
            NoGradients: No parameter has a gradient.
            Closed: The optimizer was closed.
            NonFiniteGradient: The gradients contain NaN or infinity; nothing was applied.
            ValueError: `overlap` is set, and the run's policy drops gradients that are one step stale.
            ServiceUnreachable: The service did not answer in time; it is unknown whether the push counted.
        """
        self._require_open()
        self._warn_of_other_rates()
        if overlap:
            require_stale_gradients_accepted(self.spec.aggregation)
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
                raise EvalMode("the model contains x: call train() before step()")
            if not allow_empty:
                self._gradients.require_any()
            self._gradients.gather(copy=overlap)
            reported = result if loss is None else loss
            return Batch(
                None if samples is None else float(samples),
                None if reported is None else float(reported),
            )

        if self._inflight is not None:
            # The closure is evaluated while the push is being sent.
            self._worker_group.run_on_all(evaluate)
            self.flush()
        batch = self._gradients.average(self._worker_group.run_on_all(prepare))
        assert taken_at is not None
        self._push(taken_at, batch, overlap)
        return result

    def _push(self, taken_at: Pulled, batch: Batch, overlap: bool) -> None:
        if taken_at.epoch < self._membership.granted.epoch:
            # The push before this one, which was in flight, found the run in a new epoch.
            self._rejoin("epoch-changed")
            return
        push = InflightPush(taken_at, batch, self._membership.claim(taken_at, batch))
        if overlap:
            push.start(
                self._run.begin_exchange(self._gradients.body, push.claim, self._receive_buffer, wait=self._waits)
            )
            self._inflight = push
        else:
            self._finish_push(push)

    @torch.no_grad()
    def flush(self) -> None:
        """Waits for the answer to a push in flight and loads its y; does nothing if there is none.

        Collective over the ranks of a process group.

        Raises:
            FreestepError: What the push failed with, as `step` describes.
        """
        if self._inflight is not None:
            try:
                self._finish_push(self._inflight)
            except Exception as error:
                if self._inflight.is_unresolved(error):
                    self._inflight.resend()
                else:
                    self._inflight = None
                raise
            self._inflight = None

    def _finish_push(self, push: InflightPush) -> None:
        """Waits for a push's answer, sends it again if that may help, and loads its y."""
        while True:
            exchange = partial(
                self._run.exchange, self._gradients.body, push.claim, self._receive_buffer, wait=self._waits
            )
            try:
                self.receipt, pulled = push.answer(exchange)
            except StepNotReached:
                # Its receipt came without y, and its update is late. The same claim gets the receipt again, or a
                # refusal if the run was restored meanwhile.
                push.resend()
                continue
            except LeaseExpired:
                # It was not applied and will not be under that lease; in the same epoch the gradient is still good.
                self._membership.take_lease()
                if self._membership.granted.epoch == push.taken_at.epoch:
                    push.renew(self._membership.claim(push.taken_at, push.batch))
                    continue
                self._rejoin("epoch-changed")
            except (EpochChanged, RunNotInitialized) as error:
                self._rejoin(error.slug)
            else:
                self._load_received(pulled)
                if self._waits and (
                    self.receipt.decision == "accumulated" or self.receipt.reason == "duplicate-worker"
                ):
                    self._await_update(self.receipt.step + 1)
            return

    @property
    def _waits(self) -> float:
        return _WAIT_S if self.spec.aggregation.policy in ("sync", "quorum") else 0.0

    def _rejoin(self, reason: str) -> None:
        logger.warning("the run %s dropped a push (%s) and is joined again", self._run.name, reason)
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
        """Loads x, the average, into the model, for evaluation; buffers are not changed.

        Raises:
            Closed: The optimizer was closed.
        """
        self._require_open()
        self.flush()
        if self.pulled is not None:
            self._load("x")
            self.pulled = None

    @torch.no_grad()
    def train(self) -> None:
        """Loads y, where gradients are taken, into the model; does nothing if it contains y already.

        Raises:
            Closed: The optimizer was closed.
        """
        self._require_open()
        if self.pulled is None:
            self._load("y")

    def _load(self, point: Point, *, min_step: int = 0) -> None:
        wait = _WAIT_S if min_step else 0.0
        self._load_received(self._run.pull_into(self._receive_buffer, point, min_step=min_step, wait=wait), point)

    def _load_received(self, pulled: Pulled, point: Point = "y") -> None:
        self._set_parameters(pulled, point)
        newest = self._newest
        encoder = self._gradients.encoder
        if encoder is not None and newest and pulled.epoch != newest.epoch and pulled.step < newest.step:
            # The run has lost the pushes that left the residual, perhaps on purpose.
            encoder.forget()
        self.pulled = self._newest = pulled
        self._step.fill_(pulled.step)
        place = {"run": self._run.name, "worker": self.worker, "epoch": pulled.epoch, "step": pulled.step}
        for group in self.param_groups:
            group.update(place)

    def _share_step(self) -> None:
        self.state.clear()
        for tensor in self._tensors.values():
            self.state[tensor] = {"step": self._step}

    def _set_parameters(self, pulled: Pulled, point: Point) -> None:
        """Copies the point in the receive buffer to the model."""
        self._receive_buffer.scatter(self._tensors)

    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises FreestepError: a run's parameters are fixed when it is created.

        Args:
            param_group: As for any torch optimizer, whose constructor calls this.
        """
        if self._has_all_groups:
            raise FreestepError("the run's parameters are fixed: create an optimizer with another run to train others")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The param groups, with the run, the worker, and the epoch and step of the newest point that was loaded.

        Each parameter's state is that step and, with error feedback, its part of the residual. All else of the
        optimizer's state is the run's, and is in its checkpoints. `torch.distributed.checkpoint.state_dict` keeps it
        whole. Waits for a push in flight, as `flush` does.
        """
        self.flush()
        state = super().state_dict()
        place: dict[str, Any] = {"run": self._run.name, "worker": self.worker}
        if self._gradients.encoder is not None:
            assert self._newest is not None
            place["residual"] = self._gradients.encoder.residual.clone()
            place["residual_at"] = (self._newest.epoch, self._newest.step)
            for number, (_, part) in enumerate(self._residual_parts(place["residual"])):
                state["state"][number] = {**state["state"][number], "residual": part}
        return {**state, "freestep": place}

    def _residual_parts(self, residual: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A residual's view for each parameter, in the order of `param_groups`."""
        slots = {slot.name: slot for slot in self._receive_buffer.manifest.slots}
        for name in self._tensors:
            slot = slots[name]
            yield name, residual[slot.offset : slot.offset + slot.numel].view(slot.shape)

    def _place_of(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Run, worker and residual of a state; of one without the key `freestep`, from its groups and its state."""
        if "freestep" in state_dict:
            return dict(state_dict["freestep"])
        groups = state_dict.get("param_groups") or [{}]
        place = {key: groups[0][key] for key in ("run", "worker") if key in groups[0]}
        numbers = [number for group in groups for number in group.get("params", ())]
        saved = [state_dict["state"].get(number, {}) for number in numbers]
        if self._gradients.encoder is not None and saved and all("residual" in each for each in saved):
            residual = torch.zeros_like(self._gradients.encoder.residual)
            for (_, part), each in zip(self._residual_parts(residual), saved, strict=True):
                part.copy_(each["residual"])
            place["residual"], place["residual_at"] = residual, (groups[0]["epoch"], groups[0]["step"])
        return place

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the worker's name and the residual, and joins the run again at its newest y.

        If the state has no residual, or has one of another push_encoding, the residual is set to zero.

        Args:
            state_dict: From `state_dict`.

        Raises:
            ManifestMismatch: The state is of another run.
        """
        self.flush()
        with self._worker_group.raise_on_all():
            place = self._place_of(state_dict)
            if place.get("run") != self._run.name:
                raise ManifestMismatch(f"the state is of the run {place.get('run')!r}, not {self._run.name!r}")
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "freestep"})
            self._share_step()
            if (encoder := self._gradients.encoder) is not None:
                encoder.forget()
                if "residual" in place:
                    encoder.residual = place["residual"]
                    self._newest = Pulled(*place["residual_at"])
            self._membership.worker = place["worker"]
        self._join()

    def close(self) -> None:
        """Waits for a push in flight, as `flush` does, and releases the lease; the model is not changed."""
        try:
            self.flush()
        finally:
            self._inflight = None
            self._finalizer()

    def _warn_of_other_rates(self) -> None:
        if self._rates is None:
            return
        for given, group in zip(self._rates, self.param_groups, strict=True):
            if group.get("lr") != given:
                logger.warning(
                    "a param group's lr was set to %s, by a scheduler perhaps, and has no effect: the rate is that of "
                    "the run %s, which has schedules of its own (the hyperparameters warmup_steps and schedule)",
                    group["lr"],
                    self._run.name,
                )
                self._rates = None
                return

    def _require_open(self) -> None:
        if not self._finalizer.alive:
            raise Closed(f"the optimizer of the run {self._run.name!r} was closed: make another one for the run")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError: a lease and connections cannot be copied or pickled."""
        raise TypeError(
            f"a {type(self).__name__} holds a lease and connections, and cannot be copied or pickled: "
            "make another one for the run, or save its state_dict()"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the optimizer; after an error in the block, without waiting for a push in flight."""
        if error is not None and self._inflight is not None:
            self._inflight.abandon()
            self._inflight = None
        self.close()


def _close(held: list[HeldLease], client: Client | None) -> None:
    while held:
        held.pop().release()
    if client is not None:
        client.close()
