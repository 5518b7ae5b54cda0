"""A run's whole state, or a shard's part of it, as it is received: its memory, its checks, and the copy it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pydantic import ValidationError
from torch import Tensor

from freestep.api.control import ControlRequest, RunControl, changed, in_force
from freestep.api.models import RunSpec
from freestep.api.run_state import StateDocument
from freestep.api.validation import first_fault
from freestep.errors import MalformedTensors, Overloaded
from freestep.wire.manifest import Manifest
from freestep.wire.state import StateReceiver
from freestep_service.domain.control import Control
from freestep_service.domain.data_sets import DataSets
from freestep_service.domain.reports import KEPT, MOST_METRICS
from freestep_service.optimizers import NEVER_NEGATIVE, fault_of, method_of
from freestep_service.state.buffers import memory_of
from freestep_service.state.memory_budget import MemoryBudget
from freestep_service.state.shard import StateCopy

__all__ = ["ReceivedState", "document_of"]


class ReceivedState:
    """The document and the vectors of a state, whose memory is counted in a budget until `release`.

    accept: called with the document before there is memory for the vectors; it may raise.
    """

    def __init__(self, budget: MemoryBudget, accept: Callable[[StateDocument], None]) -> None:
        self.vectors: dict[str, Tensor] = {}
        """Flat fp32 on the host, by the names of the method's state vectors."""
        self.digest = ""
        """Of the body, once it has been received."""
        self._budget = budget
        self._accept = accept
        self._document: StateDocument | None = None
        self._reserved = 0

    @property
    def document(self) -> StateDocument:
        """The document, once the header has been received."""
        assert self._document is not None
        return self._document

    def receiver(self, length: int, manifest: Manifest | None = None) -> StateReceiver:
        """Of a body of `length` bytes. manifest: of its tensors, None for those of the document's spec.

        It raises MalformedTensors, InvalidSpec, Overloaded where there is no memory, and what `accept` raises.
        """
        return StateReceiver(length, lambda document: self._begin(document, manifest), manifest)

    def _begin(self, document: StateDocument, manifest: Manifest | None) -> Sequence[memoryview]:
        self._accept(document)
        _require_sound(document)
        numel = (manifest or Manifest.of(document.spec)).numel
        size = 4 * numel * len(document.buffers)
        if not self._budget.try_reserve(size):
            raise Overloaded(f"the state takes {size} bytes of memory, and {self._budget.free} are free")
        self._reserved = size
        self.vectors = {name: torch.empty(numel, dtype=torch.float32, device="cpu") for name in document.buffers}
        self._document = document
        return [memory_of(vector) for vector in self.vectors.values()]

    def require_values(self) -> None:
        """Raises MalformedTensors where a value is NaN or infinite, or negative where a root is taken of it."""
        for name, vector in self.vectors.items():
            if not vector.numel():
                continue
            least, largest = map(float, torch.aminmax(vector))
            if not math.isfinite(least) or not math.isfinite(largest):
                raise MalformedTensors(f"the state vector {name} holds NaN or infinity")
            if least < 0 and name in NEVER_NEGATIVE:
                raise MalformedTensors(f"the state vector {name} holds negative numbers")

    def copy(self) -> StateCopy:
        """The state as one that was checkpointed, before any entry of the log; the vectors are its own."""
        document = self.document
        return StateCopy(
            epoch=0,
            step=document.step,
            seq=0,
            tensors=self.vectors,
            scalars={group: dict(scalars) for group, scalars in document.scalars.items()},
            group={},
            weight=0.0,
            damping=0.0,
            reported={name: dict(sorted(steps.items())) for name, steps in document.metrics.items()},
            expected_staleness=document.expected_staleness,
            data=DataSets.of(document.data),
            control=Control.seen(document.control),
        )

    def release(self) -> None:
        """Gives the memory back; may be called again."""
        self.vectors = {}
        self._budget.release(self._reserved)
        self._reserved = 0


def _require_sound(document: StateDocument) -> None:
    """Raises MalformedTensors where the spec's method cannot go on from a document."""
    spec = document.spec
    method = method_of(spec.optimizer)
    if set(document.buffers) != set(method.buffers):
        raise MalformedTensors(
            f"the state has the vectors {', '.join(document.buffers)}, and {spec.optimizer.algorithm} keeps "
            f"{', '.join(method.buffers)}"
        )
    spec = _in_force(document)
    groups = {parameter.group for parameter in spec.parameters}
    if groups != document.scalars.keys():
        raise MalformedTensors(f"the scalars are not those of the param groups {', '.join(sorted(groups))}")
    for group, scalars in document.scalars.items():
        if fault := fault_of(method, spec.hyperparameters(group), scalars):
            raise MalformedTensors(f"the scalars of the param group {group!r}: {fault}")
    metrics = document.metrics
    if len(metrics) > MOST_METRICS or any(len(steps) > KEPT for steps in metrics.values()):
        raise MalformedTensors(f"there are more than {MOST_METRICS} metrics, or more than {KEPT} steps of one")
    if any(step > document.step for steps in metrics.values() for step in steps):
        raise MalformedTensors("a metric was reported for a step that the state has not reached")


def _in_force(document: StateDocument) -> RunSpec:
    """The document's spec with what was changed of it. Raises MalformedTensors for what cannot have been changed."""
    control = document.control
    wish = ControlRequest(optimizer=control.optimizer, groups=control.groups, aggregation=control.aggregation)
    try:
        changed(document.spec, RunControl(), wish)
        return in_force(document.spec, control)
    except ValidationError as error:
        place, why = first_fault(error)
        raise MalformedTensors(f"control: {'.'.join(map(str, place))}: {why}") from None


def document_of(spec: RunSpec, copy: StateCopy) -> StateDocument:
    """The document of a copy's state, without the update that is being gathered in it."""
    return StateDocument(
        spec=spec,
        epoch=copy.epoch,
        step=copy.step,
        buffers=tuple(name for name in copy.tensors if name in method_of(spec.optimizer).buffers),
        scalars={group: dict(scalars) for group, scalars in copy.scalars.items()},
        expected_staleness=copy.expected_staleness,
        metrics={name: dict(steps) for name, steps in copy.reported.items()},
        data=copy.data.without_gathered().states(),
        control=Control.seen(copy.control.as_seen()).as_seen(),
    )
