"""A copy of a shard's state, as a checkpoint holds one, from which points are written as from the shard."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from freestep.api.models import Point, RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.optimizers import Quanta, method_of, segments
from freestep_service.state.shard import StateCopy, hyperparameters_of, scheduled_rates, write_point

__all__ = ["CopiedState", "vectors_of"]


def vectors_of(spec: RunSpec, point: Point) -> list[str]:
    """The names of the state vectors that a point is written from."""
    needed = {"y", "z", "x"} if point == "x" else {"y", point}
    return [name for name in method_of(spec.optimizer).buffers if name in needed]


class CopiedState:
    """A copy that points are written from.

    spec: the run's, as it was created. manifest: of the copy's vectors, of which those in `vectors_of` will do.
    """

    def __init__(self, spec: RunSpec, manifest: Manifest, copy: StateCopy) -> None:
        self.manifest = manifest
        self.scheduled_lr = scheduled_rates(spec.group_names(), copy.scalars)
        """As a shard has it."""
        self._copy = copy
        self._method = method_of(spec.optimizer)
        self._layout = segments(manifest.slots)
        self._hyperparameters = hyperparameters_of(copy.control.in_force(spec))

    def copy_point(
        self, point: Point, out: Tensor | Quanta, note: Callable[[int], object] | None = None
    ) -> tuple[int, int]:
        """As a shard's."""
        copy = self._copy
        write_point(self._method, self._layout, self._hyperparameters, copy.scalars, copy.tensors, point, out, note)
        return copy.epoch, copy.step
