"""What changes while an optimizer trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from freestep.answers import Pulled
from freestep.api.models import AggregationSpec, Receipt
from freestep.inflight_push import InflightPush
from freestep.taken_units import TakenUnits

__all__ = ["Progress"]


@dataclass
class Progress:
    """What changes while an optimizer trains, in one object.

    Lightning and Fabric wrap an optimizer in an instance of a subclass, which reads the optimizer's attributes, but
    keeps what is written to it. Both share this object.
    """

    run_id: str | None = None
    """What tells the run from others of its name; None where the service does not say."""
    aggregation: AggregationSpec | None = None
    """The policy in force, as far as is known; None before the run was joined."""
    receipt: Receipt | None = None
    """Of the last push that was answered."""
    loaded: Pulled | None = None
    """What the model contains; None before the run was joined."""
    came_with_push: bool = False
    """Whether `loaded` came with the answer of a push."""
    keeps_weights: bool = False
    """Whether the model contains weights of its owner's instead of `loaded`, until `train`."""
    gradients_at_y: list[tuple[int, int]] = field(default_factory=list)
    """Identity and version of each gradient when x was loaded."""
    taken_at: Pulled | None = None
    """The y at which gradients were taken that no push has; None where it is `loaded`."""
    has_discarded: bool = False
    """Whether gradients were set to zero that a step may be about to push."""
    has_part: bool = False
    """Whether gradients that no push has are in part of a unit of data that was given back."""
    inflight: InflightPush | None = None
    """The push whose answer has not been received, with overlap."""
    loss: float | Tensor | None = None
    """The loss that the next push reports, set from outside `step`."""
    units: TakenUnits = field(default_factory=TakenUnits)
    """The units of data that the next push names."""
    tells_begin: bool = False
    """Whether the training loop says when it begins a batch of units, by `UnitLoader.begin_next`."""
