"""RunState: a run's whole state, from a service, a file or a local optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Self

from torch import Tensor

from freestep.api.control import RunControl
from freestep.api.data import DataState
from freestep.api.models import RunSpec
from freestep.api.run_state import StateDocument
from freestep.errors import MalformedTensors, ManifestMismatch
from freestep.files import writing
from freestep.flat import Flat
from freestep.wire.manifest import Manifest
from freestep.wire.state import StateReceiver, encode_state_header

__all__ = ["IncomingState", "RunState"]


class RunState:
    """A run's whole state: every vector of its optimizer, tensor by tensor, and all scalars.

    From `Run.export_state`, `load`, or `import_state` of a local optimizer. Attributes: `spec`, the run's RunSpec,
    which may be replaced by one with another number of shards, aggregation or durability; `step`, the number of updates
    in the state; `epoch`, the epoch that it was read in; `buffers`, by name of a state vector (`y`, `z`, `exp_avg_sq`,
    ...) the tensors by name, fp32 in host memory; `scalars`, by param group the optimizer's scalars (`k`, `weight_sum`,
    `lr_max`, ...); `expected_staleness`, in steps; `metrics`, what evaluators have reported, by metric and step;
    `control`, what was changed of `spec` while the run trained, and is in force in its place, also where `spec` is
    replaced; `data`, how much of each data set has counted.

    Example:
        >>> state = run.export_state()
        >>> state.save("run.safetensors")
        >>> other.import_state(freestep.RunState.load("run.safetensors"))

    Args:
        spec: The run's spec.
        step: The number of updates in the state.
        buffers: By name of a state vector, one tensor for each of the spec's parameters, of its shape; copied.
        scalars: By param group, the optimizer's scalars.
        epoch: The epoch that the state was read in, 0 if it is of no run.
        expected_staleness: The staleness, in steps, that the run's delay correction expects.
        metrics: Metric -> step -> value.
        control: What has been changed of the spec while the run trained; None for nothing.
        data: Name of a data set -> how much of it has counted.

    Raises:
        ManifestMismatch: Names or shapes of a buffer's tensors are not the spec's.
    """

    def __init__(
        self,
        spec: RunSpec,
        step: int,
        buffers: Mapping[str, Mapping[str, Tensor]],
        scalars: Mapping[str, Mapping[str, float]],
        *,
        epoch: int = 0,
        expected_staleness: float = 0.0,
        metrics: Mapping[str, Mapping[int, float]] | None = None,
        control: RunControl | None = None,
        data: Mapping[str, DataState] | None = None,
    ) -> None:
        manifest = Manifest.of(spec)
        flats = {name: Flat(manifest) for name in buffers}
        for name, tensors in buffers.items():
            flats[name].fill(tensors)
        document = StateDocument(
            spec=spec,
            epoch=epoch,
            step=step,
            buffers=tuple(buffers),
            scalars={group: dict(each) for group, each in scalars.items()},
            expected_staleness=expected_staleness,
            metrics={name: dict(steps) for name, steps in (metrics or {}).items()},
            control=control or RunControl(),
            data=dict(data or {}),
        )
        self._assemble(document, flats)

    def _assemble(self, document: StateDocument, flats: dict[str, Flat]) -> None:
        self.spec = document.spec
        self.step = document.step
        self.epoch = document.epoch
        self.scalars = document.scalars
        self.expected_staleness = document.expected_staleness
        self.metrics = document.metrics
        self.control = document.control
        self.data = document.data
        self.buffers: dict[str, dict[str, Tensor]] = {name: flat.views for name, flat in flats.items()}
        self._flats = flats

    @classmethod
    def _of(cls, document: StateDocument, flats: dict[str, Flat]) -> Self:
        made = cls.__new__(cls)
        made._assemble(document, flats)
        return made

    def body(self) -> list[memoryview]:
        """The state as a safetensors body, without a copy: its header, and the bytes of each vector.

        Raises:
            ManifestMismatch: `spec` was replaced by one with other parameters.
        """
        manifest = Manifest.of(self.spec)
        places = [(slot.name, slot.shape) for slot in manifest.slots]
        if any(places != [(slot.name, slot.shape) for slot in flat.manifest.slots] for flat in self._flats.values()):
            raise ManifestMismatch("the state's spec has other parameters than its tensors")
        document = StateDocument(
            spec=self.spec,
            epoch=self.epoch,
            step=self.step,
            buffers=tuple(self._flats),
            scalars=self.scalars,
            expected_staleness=self.expected_staleness,
            metrics=self.metrics,
            control=self.control,
            data=self.data,
        )
        header = memoryview(encode_state_header(manifest, document))
        return [header, *(flat.bytes for flat in self._flats.values())]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a safetensors file, whole or not at all.

        Args:
            path: The file, which is replaced if it exists.

        Raises:
            OSError: The file cannot be written.
        """
        with writing(Path(path)) as file:
            for piece in self.body():
                file.write(piece)

    def set_weights(self, weights: Mapping[str, Tensor] | Flat) -> None:
        """Makes weights the state's x, y and z; moments and scalars stay.

        Args:
            weights: One tensor for each parameter, of its shape; or a flat vector.

        Raises:
            ManifestMismatch: Names or shapes are others.
        """
        tensors = weights.views if isinstance(weights, Flat) else weights
        for name in ("x", "y", "z"):
            if name in self._flats:
                self._flats[name].fill(tensors)

    def translate(self, difference: Mapping[str, Tensor] | Flat) -> None:
        """Adds a difference to the state's x, y and z, as far as it has them; moments and scalars stay.

        A run trains on from such a state as one would whose gradients are taken that far away.

        Args:
            difference: One tensor for each parameter, of its shape, fp32; or a flat vector.

        Raises:
            ManifestMismatch: A tensor is missing.
        """
        tensors = difference.views if isinstance(difference, Flat) else difference
        for name in ("x", "y", "z"):
            for parameter, tensor in self.buffers.get(name, {}).items():
                if parameter not in tensors:
                    raise ManifestMismatch(f"the tensor {parameter!r} is missing")
                tensor.add_(tensors[parameter])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a state that `save` has written, or a service has answered.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be read.
            MalformedTensors: The file is no state.
            InvalidSpec: The spec in it is not valid for this version.
        """
        with open(path, "rb") as file:
            if file.seekable():
                return cls.read_from(file, os.fstat(file.fileno()).st_size)
            # Of a pipe, only its end says how long it is.
            content = file.read()
            return cls.read_from(BytesIO(content), len(content))

    @classmethod
    def read_from(cls, file: BinaryIO, length: int) -> Self:
        """Reads a state from an open file; raises as `load` does.

        Args:
            file: Gives the bytes of the safetensors file.
            length: How many there are.
        """
        incoming = IncomingState()
        receiver = incoming.receiver(length)
        while buffer := receiver.get_buffer():
            size = file.readinto(buffer)  # type: ignore[attr-defined]
            if not size:
                raise MalformedTensors("the file ends before its tensors do")
            receiver.buffer_updated(size)
        return cls._of(incoming.document, incoming.flats)


class IncomingState:
    """Receives the body of a state; `document` and `flats` are there when its receiver is complete."""

    def __init__(self) -> None:
        self.document: StateDocument
        self.flats: dict[str, Flat] = {}

    def receiver(self, length: int) -> StateReceiver:
        """A receiver for a body of `length` bytes."""
        return StateReceiver(length, self._begin)

    def _begin(self, document: StateDocument) -> Sequence[memoryview]:
        manifest = Manifest.of(document.spec)
        self.document = document
        self.flats = {name: Flat(manifest) for name in document.buffers}
        return [flat.bytes for flat in self.flats.values()]

    def decode(self, receiver: StateReceiver) -> None:
        """Does nothing: a state's tensors are F32 as they come."""

    def state(self) -> RunState:
        """The state that was received."""
        return RunState._of(self.document, self.flats)
