"""RemoteOptimizer: a `torch.optim.Optimizer` whose steps are taken by the service."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from freestep.answers import Pulled
from freestep.api.models import AggregationSpec, Dtype, Point, PointDtype, Receipt
from freestep.api.spec import Durability
from freestep.cautions import Cautions
from freestep.client import Client
from freestep.connect import open_run
from freestep.errors import (
    Closed,
    EpochChanged,
    EvalMode,
    FreestepError,
    LeaseExpired,
    MalformedTensors,
    ManifestMismatch,
    NoGradients,
    NonFiniteGradient,
    RunNotInitialized,
    StepNotReached,
    UnitNotHeld,
)
from freestep.flat import Flat
from freestep.gradients import Gradients, PushFormat
from freestep.groups import (
    LocalParameter,
    check_groups,
    fitted,
    hyperparameter_values,
    local_parameters,
    show_hyperparameters,
    split_frozen,
)
from freestep.inflight_push import InflightPush, require_stale_gradients_accepted
from freestep.lease import HeldLease, worker_name
from freestep.membership import Membership
from freestep.names import are_numbered
from freestep.process_group import worker_group
from freestep.progress import Progress
from freestep.resume import OnMissing, way_to_resume
from freestep.run import Run
from freestep.run_request import RunRequest
from freestep.saved_state import SavedPlace, residual_by_parameter, saved_residual
from freestep.taken_units import TakenUnit, by_name
from freestep.uncompiled import uncompiled
from freestep.update_wait import FIRST_WAIT_S, log_update_wait
from freestep.weights_guard import WeightsGuard
from freestep.wire.encoding import Encoding
from freestep.wire.manifest import Manifest
from freestep.worker_group import Batch

if TYPE_CHECKING:
    from freestep.local_run import LocalLease
    from freestep.run_state import RunState

__all__ = ["RemoteOptimizer"]

logger = logging.getLogger("freestep")

_WAIT_S = 30.0
"""Seconds for which one request waits for the update of a group of pushes, after the push itself."""


class RemoteOptimizer(torch.optim.Optimizer):
    """Trains a model on a run of a freestep service.

    The first worker creates the run and uploads its model's weights; later ones check that their parameters are the
    run's, and load its weights. Each `step` pushes the gradients and loads fresh y, in one round trip. The optimizer's
    state belongs to the run, and so do the hyperparameters, which `param_groups` show: later changes of them have no
    effect. So have other changes of the weights, which the next y replaces, until `overwrite` makes them the run's.
    Either is warned about once.

    Gradients are taken at y, which the model contains from the start and after `train`; `eval` loads x, the average.
    A parameter without a gradient pushes zeros, so that it is averaged and decayed with the others: a run has one step
    for all, which its x is the average over. (Optimizers of one process leave such a parameter alone; freeze it, or
    give it a weight_decay of 0.) Each param group has, beside the hyperparameters, `scheduled_lr`, the learning rate of
    the newest update, `train_mode`, and where the model is: `run`, `worker`, `point`, `epoch`, `step`.

    Attributes: `receipt`, the Receipt of the last push that was answered, or None; `loaded`, the point, epoch and step
    (Pulled) of what the model contains; `spec`, the run's RunSpec; `loss`, to be set before `step` where its argument
    `loss` cannot be passed.

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
            part of the run. Names are the model's, without what wrappers and torch.compile add; parameters without
            names are numbered, and fit a run by their order and shapes.
        run: The run's name; None takes FREESTEP_RUN from the environment.
        url: The service's URL, as for `Client`; or "local": the run is in this process, on the service's own
            arithmetic (the `service` extra), has this one worker, and ends with the optimizer.
        token: A bearer token, as for `Client`.
        client: A client to use instead of one made of `url` and `token`; it is not closed.
        algorithm: The algorithm that the run is created with: `adamw_schedule_free`, `sgd_schedule_free`,
            `radam_schedule_free`, `schedule_free_wrapper`, `adamc_schedule_free_plus`, `gpa_adamw`, `gpa_sgd`,
            `diloco`, `sgd` or `adamw`; None is the run's, and `adamw_schedule_free` for a new run. If the run exists,
            its algorithm, hyperparameters and policy are used; a warning names those that were given otherwise.
        aggregation: The policy that the run is created with: a policy's name, or an AggregationSpec or its document.
            None is `ringmaster`, which drops gradients that are too stale.
        worker: This worker's name; None takes FREESTEP_WORKER from the environment, or a unique name. An older worker
            of the same name loses its lease, and its next step raises WorkerNameTaken.
        shards: The number of shards that the run is created with, 1 to 256; None is 1. An existing run keeps its own.
        lease_ttl_ms: Milliseconds after which a worker that does not answer counts as gone, 100 to 3,600,000; None is
            30,000.
        durability: "none"; "checkpoint", which is the default: after a crash of the service the run returns to its last
            checkpoint; or "journal": it returns to the last push that was acknowledged.
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
        process_group: A torch.distributed group whose ranks are one worker together, True for the default group, or
            "auto" for the default group if there is one; its backend must have collectives for CPU tensors, as gloo
            does. Every rank makes every call except `state_dict`, with a batch of its own; the gradient that is pushed
            is the mean over ranks, weighted by `samples` if all give them. An error on one rank is raised on all. A
            GradScaler must skip the same steps on all ranks, as torch's ShardedGradScaler does. None and False: every
            rank is a worker of its own, which None warns about, since DDP makes the gradient the same on all.
        retry_for: Seconds for which a request is repeated while the service is away, as for `Client`.
        on_missing: What `load_state_dict` does where the state's run is gone, or has gone back to an earlier step than
            the state's: "raise" raises StateMismatch; "seed" makes the model's weights the run's, unless others have
            trained the new run already; "join" loads the newest y of the run that there is.
        **hyperparameters: The algorithm's hyperparameters, with the defaults of its class in
            `freestep.api.hyperparameters`.

    Raises:
        ManifestMismatch: The run exists with other parameters; or a parameter is not dense, real and whole.
        InvalidSpec: The algorithm, a hyperparameter or the aggregation is not valid.
        FreestepError: No run is named, or the dtypes and encodings do not go together.
    """

    _owns_weights: ClassVar[bool] = True
    """Whether nobody else changes the model's weights."""

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        run: str | None = None,
        url: str | None = None,
        token: str | None = None,
        client: Client | None = None,
        algorithm: str | None = None,
        aggregation: str | Mapping[str, Any] | AggregationSpec | None = None,
        worker: str | None = None,
        shards: int | None = None,
        lease_ttl_ms: int | None = None,
        durability: Durability | None = None,
        push_dtype: Dtype | None = None,
        pull_dtype: PointDtype | None = None,
        push_encoding: Literal["dense", "int8", "topk"] = "dense",
        topk_fraction: float = 0.01,
        int8_block: int = Encoding.block,
        error_feedback: bool = True,
        process_group: ProcessGroup | bool | Literal["auto"] | None = None,
        retry_for: float | None = None,
        on_missing: OnMissing = "raise",
        **hyperparameters: Any,
    ) -> None:
        if on_missing not in get_args(OnMissing):
            raise FreestepError(f"on_missing must be 'raise', 'seed' or 'join', not {on_missing!r}")
        options = {
            "aggregation": aggregation,
            "shards": shards,
            "lease_ttl_ms": lease_ttl_ms,
            "durability": durability,
        }
        asked = RunRequest(algorithm, hyperparameters, options)
        self._worker_group = worker_group(process_group)
        self._looks_for_ranks = process_group is None
        self._on_missing = on_missing
        with self._worker_group.raise_on_all():
            kept, frozen = split_frozen(params)
            push_format = PushFormat(
                push_dtype,
                push_encoding,
                topk_fraction=topk_fraction,
                int8_block=int8_block,
                error_feedback=error_feedback,
            )
        worker = self._worker_group.run_on_first(lambda: worker or os.environ.get("FREESTEP_WORKER") or worker_name())
        self._progress = Progress()
        self._process = os.getpid()
        self._step = torch.zeros((), dtype=torch.float32, device="cpu")
        """The newest step, which every parameter's state has: torch takes an optimizer whose state is empty for new."""
        self._run, own_client = open_run(run, url, token, client, retry_for, self._worker_group)
        held: list[HeldLease | LocalLease] = []
        # Has no reference to self, so that the lease ends when the optimizer is collected or the process exits.
        self._finalizer = weakref.finalize(self, _close, held, own_client)
        self._membership = Membership(self._run, worker, self._worker_group, held)
        try:
            found = self._membership.find()
            with self._worker_group.raise_on_all():
                _, completed = asked.complete(found.spec if found else None)
                check_groups(kept, completed)
                self._has_all_groups = False
                super().__init__(kept, completed)
                self._has_all_groups = True
                parameters = local_parameters(self.param_groups)
                spec = found.spec if found else asked.spec(self.param_groups, parameters)
                parameters = fitted(parameters, spec, self._run.name)
                self._tensors = {parameter.name: parameter.tensor for parameter in parameters}
                manifest = Manifest.of(spec)
                pinned = any(tensor.is_cuda for tensor in self._tensors.values())
                module = params if isinstance(params, nn.Module) else None
                self._gradients = Gradients(
                    self._tensors, frozen, manifest, push_format, self._worker_group, module=module, pinned=pinned
                )
                self._receive_buffer = Flat(manifest, pull_dtype or "F32", pinned=pinned)
                self._guard = WeightsGuard(self._tensors, self._receive_buffer)
                self._prepare(frozen)
            status = found or self._membership.create(spec)
            self.spec, self._progress.run_id = status.spec, status.id
            self._adopt(asked, parameters, completed)
            self._share_step()
            self._join()
        except BaseException:
            self.close()
            raise

    @property
    def worker(self) -> str:
        """The worker's name."""
        return self._membership.worker

    @property
    def receipt(self) -> Receipt | None:
        """The receipt of the last push that was answered."""
        return self._progress.receipt

    @property
    def loaded(self) -> Pulled:
        """What the model contains: which point, of which epoch and step."""
        assert self._progress.loaded is not None
        return self._progress.loaded

    @property
    def loss(self) -> float | Tensor | None:
        """The mean training loss that the next push reports if `step` is given none; None once it was pushed.

        Set it on this optimizer: on what Accelerate, for example, has wrapped around it, it has no effect.
        """
        return self._progress.loss

    @loss.setter
    def loss(self, loss: float | Tensor | None) -> None:
        self._progress.loss = loss

    def _prepare(self, frozen: Sequence[tuple[str, Tensor]]) -> None:
        """Called before the run is joined; `frozen` are the parameters that were left out."""

    def _adopt(self, asked: RunRequest, parameters: Sequence[LocalParameter], completed: Iterable[str]) -> None:
        """Shows the run's hyperparameters in the groups, and warns of what was asked otherwise."""
        if differences := asked.differences(self.param_groups, parameters, self.spec):
            logger.warning(
                "the run %s exists with another spec, which is used instead of the one given: %s",
                self._run.name,
                "; ".join(map(str, differences)),
            )
        if are_numbered(self._tensors) and isinstance(self._run, Run):
            logger.warning(
                "the parameters of the run %s have no names, so `freestep pull` writes a file that does not fit the "
                "model: give the optimizer the model, or model.named_parameters()",
                self._run.name,
            )
        self._run_groups = show_hyperparameters(self.param_groups, parameters, completed, self.spec)
        guard = self._guard if self._owns_weights else None
        names = [name for name in ("lr", *hyperparameter_values(self.spec.optimizer)) if name in self.param_groups[0]]
        self._cautions = Cautions(self._run.name, self.param_groups, names, guard, of_ranks=self._looks_for_ranks)

    def _join(self) -> None:
        """Takes a lease and loads the run's y; uploads this model's weights if the run has none."""
        self._membership.take_lease()
        self._load_first()

    def _load_first(self) -> None:
        while True:
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

    @uncompiled
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

        Parameters without a gradient push zeros. Under the policies `sync` and `quorum`, and under robust rules that
        compare pushes, it returns when the update that the push is part of has been applied. A push that the run no
        longer accepts, since it was restored to an earlier step for example, is dropped: the run is joined again at its
        newest y, and the receipt's reason says why.

        Args:
            closure: Computes the loss and the gradients, and returns the loss. Nothing is pushed if it returns None and
                leaves no gradients, as Lightning's does for a batch that is skipped.
            loss: The batch's mean training loss, which the run's status shows; None takes the attribute `loss`, else
                the closure's.
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
            EvalMode: The model contains x, or kept weights; call `train` first.
            ManifestMismatch: A parameter of the run was frozen, or a frozen one has a gradient.
            NoGradients: No parameter has a gradient.
            Closed: The optimizer was closed.
            NonFiniteGradient: The gradients contain NaN or infinity; nothing was applied.
            ValueError: `overlap` is set, and the run's policy drops gradients that are one step stale.
            ServiceUnreachable: The service did not answer in time; it is unknown whether the push counted.
        """
        self._require_open()
        self._cautions.before_step(self.param_groups)
        self._warn_of_changed_weights()
        if overlap:
            require_stale_gradients_accepted(self.spec.aggregation)
        taken_at, result, had_closure = self.loaded, None, closure is not None

        def evaluate() -> None:
            nonlocal closure, result
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
                closure = None

        def prepare() -> Batch:
            evaluate()
            self._require_y("step")
            self._gradients.gather(copy=overlap)
            if not allow_empty:
                self._gradients.require_any()
            reported = self._take_loss(loss, result)
            return Batch(
                None if samples is None else float(samples),
                None if reported is None else float(reported),
            )

        if self._progress.inflight is not None:
            # The closure is evaluated while the push is being sent.
            self._worker_group.run_on_all(evaluate)
            self.flush()
        try:
            batches = self._worker_group.run_on_all(prepare)
        except NoGradients:
            if had_closure and result is None and self._worker_group.size == 1:
                return None
            raise
        self._push(taken_at, self._gradients.average(batches), overlap)
        return result

    def _take_loss(self, loss: float | Tensor | None, result: float | None) -> float | Tensor | None:
        """The loss that a step reports: its argument, else the one that was set, else its closure's."""
        reported = next((each for each in (loss, self.loss, result) if each is not None), None)
        self.loss = None
        return reported

    def _push(self, taken_at: Pulled, batch: Batch, overlap: bool) -> None:
        units = self._progress.units.take(self._run.name)
        if taken_at.epoch < self._membership.granted.epoch:
            # The push before this one, which was in flight, found the run in a new epoch.
            self._rejoin("epoch-changed")
            return
        if any(unit.lease.lease != self._membership.granted.lease for unit in units):
            self._drop_with_units(units)
            return
        push = InflightPush(taken_at, batch, self._membership.claim(taken_at, batch, by_name(units)), units)
        if overlap:
            push.start(
                self._run.begin_exchange(self._gradients.body, push.claim, self._receive_buffer, wait=self._waits)
            )
            self._progress.inflight = push
            return
        try:
            self._finish_push(push)
        except BaseException as error:
            if push.is_unresolved(error):
                self._progress.units.restore(units)
            else:
                self._open_units(push, error)
            raise

    @torch.no_grad()
    def flush(self) -> None:
        """Waits for the answer to a push in flight and loads its y; does nothing if there is none.

        Collective over the ranks of a process group.

        Raises:
            FreestepError: What the push failed with, as `step` describes.
            Closed: A push is in flight, and this is a fork of the process that made the optimizer.
        """
        if self._progress.inflight is not None:
            self._require_open()
        if (push := self._progress.inflight) is not None:
            try:
                self._finish_push(push)
            except Exception as error:
                if push.is_unresolved(error):
                    push.resend()
                else:
                    self._progress.inflight = None
                    self._open_units(push, error)
                raise
            self._progress.inflight = None

    def _finish_push(self, push: InflightPush) -> None:
        """Waits for a push's answer, sends it again if that may help, and loads its y."""
        self._guard.suspend()
        while True:
            exchange = partial(
                self._run.exchange, self._gradients.body, push.claim, self._receive_buffer, wait=self._waits
            )
            try:
                receipt, pulled = push.answer(exchange)
            except StepNotReached:
                # Its receipt came without y, and its update is late. The same claim gets the receipt again, or a
                # refusal if the run was restored meanwhile.
                push.resend()
                continue
            except LeaseExpired:
                # It was not applied and will not be under that lease; in the same epoch the gradient is still good.
                self._membership.replace_lost_lease()
                if self._membership.granted.epoch == push.taken_at.epoch:
                    if push.units:
                        self._drop_with_units(push.units)
                        return
                    push.renew(self._membership.claim(push.taken_at, push.batch))
                    continue
                self._rejoin("epoch-changed")
            except (EpochChanged, RunNotInitialized) as error:
                self._rejoin(error.slug)
            except UnitNotHeld:
                self._drop_with_units(push.units)
            else:
                self._progress.receipt = receipt
                self._load_received(pulled, came_with_push=True)
                if self._waits and (receipt.decision == "accumulated" or receipt.reason == "duplicate-worker"):
                    self._await_update(receipt.step + 1)
            return

    @property
    def _waits(self) -> float:
        return FIRST_WAIT_S if self.spec.aggregation.takes_one_each else 0.0

    def _rejoin(self, reason: str) -> None:
        logger.warning("the run %s dropped a push (%s) and is joined again", self._run.name, reason)
        self._join()
        self._note_dropped(reason)

    def _note_dropped(self, reason: str) -> None:
        self._progress.receipt = Receipt(decision="dropped", reason=reason, step=self.loaded.step, staleness=0)

    def _drop_with_units(self, units: Sequence[TakenUnit]) -> None:
        """Drops a gradient some of whose units others have by now, and have perhaps counted."""
        logger.warning(
            "a push to the run %s is dropped, since the lease of this worker has lost units of data that its gradient "
            "was taken on: they are others' now",
            self._run.name,
        )
        self._progress.units.give_back(unit for unit in units if unit.lease.lease == self._membership.granted.lease)
        self._load("y")
        self._note_dropped("unit-not-held")

    def _open_units(self, push: InflightPush, error: BaseException) -> None:
        """Gives back the units of a push that was refused, unless the service has opened them itself."""
        if not isinstance(error, (NonFiniteGradient, MalformedTensors)):
            self._progress.units.give_back(push.units)

    def _note_units(self, units: Sequence[TakenUnit]) -> None:
        """Notes that the next gradient is taken on units; none where a unit that goes on is in it."""
        self._progress.units.add(units, self._gradients.versions())

    def _give_back_used(self, gradients: Iterable[tuple[int, int]]) -> None:
        """Gives back the units whose gradients are discarded; `gradients` are their versions before."""
        if used := self._progress.units.drop_used(gradients):
            self._progress.units.give_back(used)

    @property
    def _has_units(self) -> bool:
        """Whether there are units of data that no push has named."""
        return self._progress.units.has_any()

    def _regain_lease(self) -> None:
        """Takes a lease in place of one that has ended, and y where the run has gone back meanwhile."""
        self.flush()
        self._membership.replace_lost_lease()
        if self._membership.granted.epoch != self.loaded.epoch:
            self._load_first()

    def _require_same_spec(self) -> None:
        """Warns if the run is another one of its name by now; raises ManifestMismatch if that has another spec."""
        status = self._membership.find()
        if status is None or status.id == self._progress.run_id:
            return
        if status.spec.model_copy(update={"shards": self.spec.shards}) != self.spec:
            raise ManifestMismatch(
                f"the run {self._run.name!r} was deleted, and another of its name has another spec: make the optimizer "
                "again to train that one"
            )
        logger.warning("the run %s was deleted, and this worker trains another of its name now", self._run.name)
        self._progress.run_id = status.id

    def _await_update(self, step: int) -> None:
        while True:
            if self._worker_group.rank == 0:
                log_update_wait(self._run.name, step, self.spec.aggregation, self._run.workers)
            try:
                self._load("y", min_step=step)
                return
            except StepNotReached:
                if self._membership.is_lost():
                    self._rejoin("lease-expired")
                    return

    # Points

    @uncompiled
    @torch.no_grad()
    def eval(self) -> None:
        """Loads the newest x, the average, into the model, for evaluation; buffers are not changed.

        Does nothing after `keep_weights`.

        Raises:
            Closed: The optimizer was closed.
        """
        self._require_open()
        self.flush()
        if not self._progress.keeps_weights:
            self._warn_of_changed_weights()
            self._load("x")
            self._progress.gradients_at_y = self._gradients.versions()

    @uncompiled
    @torch.no_grad()
    def train(self) -> None:
        """Loads the newest y, where gradients are taken, into the model.

        Does nothing if `step` has loaded it already, or if there are gradients, which were taken at the y before.

        Raises:
            Closed: The optimizer was closed.
        """
        self._require_open()
        if not self._progress.keeps_weights:
            if self._progress.inflight is not None or self._progress.came_with_push:
                return
            if self._worker_group.run_on_first(lambda: self.loaded.point == "y" and self._gradients.has_any()):
                return
            self._warn_of_changed_weights()
        gradients = self._gradients.versions()
        if self.loaded.point == "x" and self._gradients.discard_if_changed(self._progress.gradients_at_y):
            logger.warning("gradients that were taken at x are discarded: call train() before backward()")
            self._give_back_used(gradients)
        self._load("y")

    def keep_weights(self) -> None:
        """Has `eval` leave the weights that the model contains now, until `train` loads y again.

        For weights that are to be evaluated and saved as they are, while others may go on with the run: those of the
        best checkpoint, or an x that has been evaluated.

        Raises:
            FreestepError: A push is in flight, whose answer would replace the weights: call `flush` before they are
                loaded.
            Closed: The optimizer was closed.
        """
        self._require_open()
        if self._progress.inflight is not None:
            raise FreestepError(
                "a push is in flight, and its answer would replace the weights: call flush() before they are loaded"
            )
        self._progress.keeps_weights = True

    @torch.no_grad()
    def overwrite(self) -> None:
        """Makes the weights that the model contains the run's: x, y and z are then these, in a new epoch.

        For weights that were changed on purpose: pretrained ones loaded late, or pruned ones. The rest of the state
        (moments, step, weights of the average) stays, and other workers join again at the new y. It moves the run's
        whole state twice, so it is nothing for every step. Collective over the ranks of a process group.

        Raises:
            EpochChanged: The run has moved on meanwhile; nothing was changed.
            Closed: The optimizer was closed.
        """
        self._require_open()
        self.flush()
        weights = Flat(self._receive_buffer.manifest)
        weights.fill(self._tensors)
        self._worker_group.run_on_first(lambda: self._run.overwrite(weights))
        self._join()

    def export_state(self) -> RunState:
        """The run's whole state, which `Run.import_state` gives to a run of another service, or `save` to a file.

        So does a run with `url="local"` go on at a service. In a process group any rank may call it alone.

        Raises:
            Closed: The optimizer was closed.
        """
        self._require_open()
        if self._worker_group.size == 1:
            self.flush()
        return self._run.export_state()

    def _load(self, point: Point, *, min_step: int = 0) -> None:
        wait = _WAIT_S if min_step else 0.0
        self._guard.suspend()
        self._load_received(self._run.pull_into(self._receive_buffer, point, min_step=min_step, wait=wait))

    def _load_received(self, pulled: Pulled, *, came_with_push: bool = False) -> None:
        before, encoder = self._progress.loaded, self._gradients.encoder
        if before is not None and pulled.epoch != before.epoch:
            self._require_same_spec()
            if pulled.step < before.step:
                logger.warning("the run %s went back from step %d to %d", self._run.name, before.step, pulled.step)
                if encoder is not None:
                    # The run has lost the pushes that left the residual, perhaps on purpose.
                    encoder.forget()
        self._set_parameters(pulled)
        self._guard.note_loaded()
        self._note_loaded(pulled, came_with_push=came_with_push)

    def _note_loaded(self, pulled: Pulled, *, came_with_push: bool = False) -> None:
        self._progress.loaded, self._progress.came_with_push = pulled, came_with_push
        self._progress.keeps_weights = False
        self._step.fill_(pulled.step)
        # As in the schedulefree package, 0 before the first update.
        rates = pulled.scheduled_lr or ([] if pulled.step else [0.0] * len(self.spec.group_names()))
        entries = {**self._place().entries(), "train_mode": pulled.point == "y"}
        for group, number in zip(self.param_groups, self._run_groups, strict=True):
            group.update(entries)
            if rates:
                group["scheduled_lr"] = rates[number]

    def _place(self) -> SavedPlace:
        loaded = self.loaded
        return SavedPlace(self._run.name, self._progress.run_id, self.worker, loaded.point, loaded.epoch, loaded.step)

    def _share_step(self) -> None:
        self.state.clear()
        for tensor in self._tensors.values():
            self.state[tensor] = {"step": self._step}

    def _set_parameters(self, pulled: Pulled) -> None:
        """Copies the point in the receive buffer to the model."""
        self._receive_buffer.scatter(self._tensors)

    # torch.optim.Optimizer

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; units of data whose gradients no `step` has pushed are given back.

        Args:
            set_to_none: As for any torch optimizer.
        """
        if self._has_units:
            self._give_back_used(self._gradients.versions())
        super().zero_grad(set_to_none)
        if self._has_units:
            self._progress.units.note_cleared(self._gradients.versions())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises FreestepError: a run's parameters are fixed when it is created.

        Args:
            param_group: As for any torch optimizer, whose constructor calls this.
        """
        if self._has_all_groups:
            raise FreestepError("the run's parameters are fixed: create an optimizer with another run to train others")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The param groups, which say where the model is, and for each parameter the step.

        With error feedback it is also the parameter's part of the residual. All else of the optimizer's state is the
        run's, and is in its checkpoints; `Run.export_state` reads it, and with `url="local"` it is the entry `local`.
        Waits for a push in flight, as `flush` does, except in a process group, where any rank may call it alone: the
        push then counts as answered.
        """
        if self._worker_group.size == 1:
            self.flush()
        state = super().state_dict()
        if not isinstance(self._run, Run):
            state["local"] = self._run.state_dict()
        if self._gradients.encoder is not None:
            residual = self._gradients.encoder.residual.clone()
            parts = residual_by_parameter(residual, self._tensors, self._receive_buffer.manifest)
            for number, part in enumerate(parts):
                state["state"][number] = {**state["state"][number], "residual": part}
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues where a state was saved: restores the residual, and loads the run's newest y.

        The worker's name is restored too, unless another worker lives under it. Sends no request where the state is of
        this very moment. If the state has no residual, or has one of another push_encoding, the residual is set to
        zero. Hyperparameters are the run's. A run with `url="local"` becomes what it was.

        Args:
            state_dict: From `state_dict`.

        Raises:
            ManifestMismatch: The state is of another run, or of another optimizer.
            StateMismatch: The run is gone, or has gone back to an earlier step; see `on_missing`.
        """
        self._require_open()
        self.flush()
        with self._worker_group.raise_on_all():
            place = SavedPlace.of(state_dict, self._run.name)
            self._require_same_kind(state_dict)
            self._require_same_groups(state_dict)
            residual = saved_residual(state_dict, self._tensors, self._receive_buffer.manifest)
            if isinstance(self._run, Run) and "local" in state_dict:
                raise ManifestMismatch(f"the state is of a run with url='local', and {self._run.name!r} is a service's")
        if not isinstance(self._run, Run):
            self._run.load_state_dict(state_dict.get("local"))
            self._join()
        elif place != self._place() or any(self._worker_group.run_on_all(self._are_weights_changed)):
            self._resume(place)
        if (encoder := self._gradients.encoder) is not None:
            encoder.forget()
            if residual is not None and self.loaded.step >= place.step:
                encoder.residual = residual

    def _require_same_kind(self, state_dict: Mapping[str, Any]) -> None:
        if "inner" in state_dict:
            raise ManifestMismatch("the state is of LocalSteps, and has the state of its inner optimizer and its round")

    def _require_same_groups(self, state_dict: Mapping[str, Any]) -> None:
        here, there = (
            [len(group["params"]) for group in groups] for groups in (self.param_groups, state_dict["param_groups"])
        )
        if here != there:
            raise ManifestMismatch(
                f"the state has param groups of {there} parameters, and this optimizer has groups of {here}"
            )

    def _resume(self, place: SavedPlace) -> None:
        if way_to_resume(place, self._membership.find(), self._on_missing) == "seed":
            self.overwrite()
            return
        self._membership.take_name(place.worker)
        self._join()
        logger.warning(
            "the run %s goes on at step %d, whose y was loaded; the state was saved at step %d",
            place.run,
            self.loaded.step,
            place.step,
        )

    def close(self) -> None:
        """Waits for a push in flight, as `flush` does, and releases the lease; the model is not changed."""
        try:
            if self._process == os.getpid():
                self.flush()
        finally:
            self._progress.inflight = None
            self._finalizer()

    def _warn_of_changed_weights(self) -> None:
        # An answer in flight changes what the weights are compared with; kept ones are meant to differ.
        if self._progress.inflight is None and not self._progress.keeps_weights:
            self._cautions.before_load()

    def _are_weights_changed(self) -> bool:
        return self._guard.changed() is not None

    def _require_y(self, call: str) -> None:
        if self._progress.keeps_weights:
            raise EvalMode(f"the model contains weights that were kept: call train() before {call}()")
        if self.loaded.point != "y":
            raise EvalMode(f"the model contains x: call train() before {call}()")

    @property
    def _is_open(self) -> bool:
        """Whether this process made the optimizer, and it was not closed."""
        return self._process == os.getpid() and self._finalizer.alive

    def _require_open(self) -> None:
        if self._process != os.getpid():
            raise Closed(
                f"the optimizer of the run {self._run.name!r} belongs to the process that made it, and this is a fork "
                "of that: make another one here"
            )
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
        if error is not None and self._progress.inflight is not None:
            self._progress.inflight.abandon()
            self._progress.inflight = None
        self.close()


def _close(held: list[HeldLease | LocalLease], client: Client | None) -> None:
    while held:
        held.pop().release()
    if client is not None:
        client.close()
