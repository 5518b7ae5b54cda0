"""RemoteOptimizer: a `torch.optim.Optimizer` whose steps are taken by the service.

How it joins a run is in `joined_optimizer`, and its steps are in `pushing_optimizer`. The law of this file: gradients
are taken at y, so what else the model contains, x or weights of the user's own, is there until `train`; and a saved
state continues on the run that it is of, or says that it cannot.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.distributed import ProcessGroup

from freestep.api.models import AggregationSpec, Dtype, PointDtype
from freestep.api.spec import Durability
from freestep.client import Client
from freestep.connect import open_run
from freestep.errors import FreestepError, ManifestMismatch
from freestep.flat import Flat
from freestep.gradients import PushFormat
from freestep.groups import split_frozen
from freestep.lease import worker_name
from freestep.leaving import leave_if_asked
from freestep.process_group import worker_group
from freestep.pushing_optimizer import PushingOptimizer
from freestep.resume import OnMissing, way_to_resume
from freestep.run import Run
from freestep.run_request import RunRequest
from freestep.saved_state import SavedPlace, residual_by_parameter, saved_residual
from freestep.uncompiled import uncompiled
from freestep.wire.encoding import Encoding

if TYPE_CHECKING:
    from freestep.run_state import RunState

__all__ = ["RemoteOptimizer"]

logger = logging.getLogger("freestep")


class RemoteOptimizer(PushingOptimizer):
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

    Not safe to use from several threads. Use it as a context manager, or call `close`. With FREESTEP_LEAVE_ON_SIGTERM=1
    in the environment, it calls `leave_on_sigterm`.

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
            its algorithm, hyperparameters and policy are used; a warning names those that were given otherwise, and
            one says so where the run's is `diloco`, which is for `LocalSteps`.
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
            is the mean over ranks, weighted by `samples` if all give them. An error on one rank, or a
            KeyboardInterrupt, is raised on all. A GradScaler must skip the same steps on all ranks, as torch's
            ShardedGradScaler does. None and False: every rank is a worker of its own, which None warns about, since DDP
            makes the gradient the same on all.
        retry_for: Seconds for which a request is repeated while the service is away, as for `Client`.
        on_missing: What `load_state_dict` does where the state's run is gone, or has gone back to an earlier step than
            the state's: "raise" raises StateMismatch; "seed" makes the model's weights the run's, unless others have
            trained the new run already; "join" loads the newest y of the run that there is.
        **hyperparameters: The algorithm's hyperparameters, with the defaults of its class in
            `freestep.api.hyperparameters`.

    Raises:
        ManifestMismatch: The run exists with other parameters; or a parameter is not dense, real, whole and writable,
            shares memory with another, or is not finite where there is no run yet.
        InvalidSpec: The algorithm, a hyperparameter or the aggregation is not valid.
        MalformedRequest: No worker can have the name.
        FreestepError: No run is named, or the dtypes and encodings do not go together.
        TypeError: `params` are none.
    """

    _new_aggregation: Mapping[str, Any] | None = None
    """The policy that a run is created with where none is given; None for that of all runs."""

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
        asked = RunRequest(algorithm, hyperparameters, options, self._new_aggregation)
        self._on_missing = on_missing
        ranks = worker_group(process_group)
        with ranks.raise_on_all():
            # Before there is a lease.
            leave_if_asked()
            kept, frozen = split_frozen(params)
            asked.check()
            push_format = PushFormat(
                push_dtype,
                push_encoding,
                topk_fraction=topk_fraction,
                int8_block=int8_block,
                error_feedback=error_feedback,
            )
        worker = ranks.run_on_first(lambda: worker_name(worker or os.environ.get("FREESTEP_WORKER")))
        opened, own_client = open_run(run, url, token, client, retry_for, ranks)
        super().__init__(
            kept,
            asked,
            frozen=frozen,
            module=params if isinstance(params, nn.Module) else None,
            run=opened,
            own_client=own_client,
            worker=worker,
            ranks=ranks,
            push_format=push_format,
            pull_dtype=pull_dtype or "F32",
            looks_for_ranks=process_group is None,
        )
        if algorithm is None and self.spec.optimizer.algorithm == "diloco":
            logger.warning(
                "the run %s is of the algorithm diloco, which takes the progress of many local steps at a time, and "
                "this worker pushes gradients: use LocalSteps, or another run",
                opened.name,
            )

    # Points

    @uncompiled
    @torch.no_grad()
    def eval(self) -> None:
        """Loads the newest x, the average, into the model, for evaluation; buffers are not changed.

        Gradients that no push has stay, and their push is as stale as the y at which they were taken. Does nothing
        after `keep_weights`.

        Raises:
            Closed: The optimizer was closed.
        """
        self._require_open()
        self.flush()
        if not self._progress.keeps_weights:
            self._warn_of_changed_weights()
            self._note_where_taken()
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
            self._progress.taken_at = None
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

    # torch.optim.Optimizer

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
