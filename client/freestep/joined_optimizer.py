"""An optimizer as a member of a run: how it joins, what its model contains, and until when it is open.

The law of this file: the model contains a whole point of the run that its worker holds a lease of, and `loaded`, the
param groups and the state say which point of which epoch and step, until the owner of the weights changes them. Who
was closed, or is in a fork of the process that made it, is told so by every call.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from freestep.answers import Pulled
from freestep.api.models import AggregationSpec, Point, PointDtype
from freestep.cautions import Cautions
from freestep.client import Client
from freestep.errors import Closed, EvalMode, FreestepError, ManifestMismatch, RunNotInitialized
from freestep.flat import Flat
from freestep.gradients import Gradients, PushFormat
from freestep.groups import (
    LocalParameter,
    check_groups,
    fitted,
    hyperparameter_values,
    local_parameters,
    require_finite,
    show_hyperparameters,
)
from freestep.lease import HeldLease
from freestep.membership import Membership
from freestep.names import are_numbered
from freestep.progress import Progress
from freestep.run import Run
from freestep.run_request import RunRequest
from freestep.saved_state import SavedPlace
from freestep.weights_guard import WeightsGuard
from freestep.wire.manifest import Manifest
from freestep.worker_group import WorkerGroup

if TYPE_CHECKING:
    from freestep.local_run import LocalLease, LocalRun

__all__ = ["JoinedOptimizer"]

logger = logging.getLogger("freestep")

_WAIT_S = 30.0
"""Seconds for which one request waits for the update of a group of pushes, after the push itself."""


class JoinedOptimizer(torch.optim.Optimizer):
    """A worker that has joined a run, and its model, into which points of the run are loaded.

    The run is created unless there is one, and has this model's weights if it has none.

    Attributes: `spec`, the run's RunSpec.

    Args:
        params: Parameters or param groups, without the frozen ones.
        asked: What the run is created with.
        frozen: The names and tensors of the parameters that were left out.
        module: The module that the parameters are of, if it was given.
        run: The run's calls.
        own_client: The client to close with the optimizer, if it is the optimizer's own.
        worker: The worker's name.
        ranks: The processes that are one worker together.
        push_format: How gradients are sent.
        pull_dtype: The dtype in which points are received.
        looks_for_ranks: Whether it is warned of other ranks that push the same gradient.

    Raises:
        ManifestMismatch: The run exists with other parameters; or a parameter is not dense, real, whole and writable,
            shares memory with another, or is not finite where there is no run yet.
        InvalidSpec: The algorithm, a hyperparameter or the aggregation is not valid.
    """

    _owns_weights: ClassVar[bool] = True
    """Whether nobody else changes the model's weights."""

    def __init__(
        self,
        params: Iterable[Any],
        asked: RunRequest,
        *,
        frozen: Sequence[tuple[str, Tensor]],
        module: nn.Module | None,
        run: Run | LocalRun,
        own_client: Client | None,
        worker: str,
        ranks: WorkerGroup,
        push_format: PushFormat,
        pull_dtype: PointDtype,
        looks_for_ranks: bool,
    ) -> None:
        self._run = run
        self._worker_group = ranks
        self._looks_for_ranks = looks_for_ranks
        self._progress = Progress()
        self._process = os.getpid()
        self._step = torch.zeros((), dtype=torch.float32, device="cpu")
        """The newest step, which every parameter's state has: torch takes an optimizer whose state is empty for new."""
        held: list[HeldLease | LocalLease] = []
        # Has no reference to self, so that the lease ends when the optimizer is collected or the process exits.
        self._finalizer = weakref.finalize(self, _close, held, own_client)
        self._membership = Membership(run, worker, ranks, held)
        try:
            found = self._membership.find()
            with ranks.raise_on_all():
                _, completed = asked.complete(found.spec if found else None)
                check_groups(params, completed)
                self._has_all_groups = False
                super().__init__(params, completed)
                self._has_all_groups = True
                parameters = local_parameters(self.param_groups)
                spec = found.spec if found else asked.spec(self.param_groups, parameters)
                if found is None:
                    require_finite(parameters)
                self._require_policy(spec.aggregation)
                parameters = fitted(parameters, spec, run.name)
                self._tensors = {parameter.name: parameter.tensor for parameter in parameters}
                manifest = Manifest.of(spec)
                pinned = any(tensor.is_cuda for tensor in self._tensors.values())
                self._gradients = Gradients(
                    self._tensors, frozen, manifest, push_format, ranks, module=module, pinned=pinned
                )
                self._receive_buffer = Flat(manifest, pull_dtype, pinned=pinned)
                self._guard = WeightsGuard(self._tensors, self._receive_buffer)
                self._prepare(frozen)
            status = found or self._membership.create(spec)
            self._require_policy(status.in_force.aggregation)
            self.spec, self._progress.run_id = status.spec, status.id
            self._progress.aggregation = status.in_force.aggregation
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
    def loaded(self) -> Pulled:
        """What the model contains: which point, of which epoch and step."""
        assert self._progress.loaded is not None
        return self._progress.loaded

    @property
    def shares_memory(self) -> bool:
        """Whether large bodies go through memory that is shared with the service, as for `Run`."""
        return isinstance(self._run, Run) and self._run.shares_memory

    def _prepare(self, frozen: Sequence[tuple[str, Tensor]]) -> None:
        """Called before the run is joined; `frozen` are the parameters that were left out."""

    def _require_policy(self, aggregation: AggregationSpec) -> None:
        """Raises where the worker's pushes would be dropped under a policy: of a run that is about to be created, or
        of one that there is."""

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
                "model: give the optimizer the model or model.named_parameters(), whose pairs param groups take too",
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

    # Points

    def _load(self, point: Point, *, min_step: int = 0, wait: float | None = None) -> None:
        """Loads a point. wait: seconds for which the service may wait for min_step."""
        if wait is None:
            wait = _WAIT_S if min_step else 0.0
        self._guard.suspend()
        self._load_received(self._run.pull_into(self._receive_buffer, point, min_step=min_step, wait=wait))

    def _load_received(self, pulled: Pulled, *, came_with_push: bool = False) -> None:
        before, encoder = self._progress.loaded, self._gradients.encoder
        if before is not None and pulled.epoch != before.epoch:
            self._require_same_spec()
            if pulled.step < before.step:
                logger.warning(
                    "the run %s went back: this worker, which had step %d, goes on from step %d of epoch %d",
                    self._run.name, before.step, pulled.step, pulled.epoch,
                )  # fmt: skip
                if encoder is not None:
                    # The run has lost the pushes that left the residual, perhaps on purpose.
                    encoder.forget()
        try:
            self._take_over(pulled, came_with_push)
        except BaseException as error:
            if not isinstance(error, Exception):
                # A signal has come meanwhile: the model is to contain a whole point all the same.
                self._take_over(pulled, came_with_push)
            raise

    def _take_over(self, pulled: Pulled, came_with_push: bool) -> None:
        """Has the model contain the point in the receive buffer. May be repeated where it was interrupted."""
        self._set_parameters(pulled)
        self._guard.note_loaded()
        self._note_loaded(pulled, came_with_push=came_with_push)

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

    def _set_parameters(self, pulled: Pulled) -> None:
        """Copies the point in the receive buffer to the model."""
        self._receive_buffer.scatter(self._tensors)

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

    def _require_y(self, call: str) -> None:
        if self._progress.keeps_weights:
            raise EvalMode(f"the model contains weights that were kept: call train() before {call}()")
        if self.loaded.point != "y":
            raise EvalMode(f"the model contains x: call train() before {call}()")

    def _warn_of_changed_weights(self) -> None:
        # An answer in flight changes what the weights are compared with; kept ones are meant to differ.
        if self._progress.inflight is None and not self._progress.keeps_weights:
            self._cautions.before_load()

    def _are_weights_changed(self) -> bool:
        return self._guard.changed() is not None

    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises FreestepError: a run's parameters are fixed when it is created.

        Args:
            param_group: As for any torch optimizer, whose constructor calls this.
        """
        if self._has_all_groups:
            raise FreestepError("the run's parameters are fixed: create an optimizer with another run to train others")
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError: a lease and connections cannot be copied or pickled."""
        raise TypeError(
            f"a {type(self).__name__} holds a lease and connections, and cannot be copied or pickled: "
            "make another one for the run, or save its state_dict()"
        )

    # Until when it is open

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

    def close(self) -> None:
        """Releases the lease; the model is not changed."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the optimizer."""
        self.close()


def _close(held: list[HeldLease | LocalLease], client: Client | None) -> None:
    while held:
        held.pop().release()
    if client is not None:
        client.close()
