"""What every algorithm's hyperparameters have in common, and how a param group changes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from freestep.api.validation import Positive, StrictModel, fault

__all__ = ["Hyperparameters"]


class Hyperparameters(StrictModel):
    """The hyperparameters of an algorithm; a param group may have others in their place."""

    needs_loss: ClassVar[bool] = False
    """True if every push must report its loss."""
    of_the_run: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that a param group cannot change."""

    max_grad_norm: Positive | None = None
    """The largest 2-norm of a push's gradient over all parameters of the run: a longer gradient is scaled to it. None
    does not limit it."""

    def overruled(self, overrides: Mapping[str, Any]) -> Self:
        """A param group's hyperparameters: these, with the group's own in their place. Raises ValidationError."""
        for name in ("algorithm", "max_grad_norm", *self.of_the_run):
            if name in overrides:
                raise fault((name,), f"{name} belongs to the run, and cannot differ between groups")
        made = type(self).model_validate({**self.model_dump(), **overrides})
        for name, kept in self._state().items():
            if made._state()[name] != kept:
                raise fault((name,), "changes which state the optimizer keeps, which must be the same in all groups")
        return made

    def _state(self) -> dict[str, Any]:
        """By hyperparameter, what decides which vectors the optimizer keeps."""
        return {}

    def fixed(self) -> dict[str, tuple[Any, str]]:
        """By hyperparameter, what of it cannot change while a run trains, and why."""
        why = "changes which state the optimizer keeps: create another run"
        return {name: (kept, why) for name, kept in self._state().items()}

    @property
    def takes_matrices(self) -> bool:
        """True if a step takes each parameter whole, as a matrix."""
        return False
