"""All of a run's state that is no vector, as JSON beside the state's vectors."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from freestep.api.control import RunControl
from freestep.api.data import MOST_DATA_SETS, MOST_OPEN, DataName, DataState
from freestep.api.spec import RunSpec
from freestep.api.validation import LARGEST_INTEGER, Count, MetricName, NonNegative, StrictModel

__all__ = ["StateDocument"]

_Value = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Number = Annotated[int, Field(strict=True, ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)] | _Value
_MOST_STEPS = 10**13
"""Redis's scripts write a run's step with fourteen digits, and it goes on from the state's."""


class StateDocument(StrictModel):
    """A run's spec, where it stands, and the scalars of its optimizer."""

    spec: RunSpec
    """The run's spec, with the number of shards that it was created with."""
    epoch: Count = 0
    """The epoch that the state was read in; a run that takes the state begins another."""
    step: Annotated[int, Field(strict=True, ge=0, le=_MOST_STEPS)]
    """The number of updates that the state contains."""
    buffers: Annotated[tuple[str, ...], Field(min_length=1, max_length=16)]
    """The names of the optimizer's state vectors; `y` is one of them."""
    scalars: dict[str, dict[str, _Number]]
    """Param group -> name -> value: `k`, the steps that were taken, and what else the algorithm keeps (`weight_sum`,
    `lr_max`, `beta`, ...)."""
    expected_staleness: NonNegative = 0.0
    """The staleness, in steps, that the run's delay correction expects."""
    metrics: dict[MetricName, dict[Count, _Value]] = Field(default_factory=dict)
    """Metric -> step -> value, as evaluators have reported them."""
    data: Annotated[dict[DataName, DataState], Field(max_length=MOST_DATA_SETS)] = Field(default_factory=dict)
    """Name -> how much of a data set has counted."""
    control: RunControl = RunControl()
    """What has been changed of the run since it was created. Whether it is paused, and who is suspended, is no part of
    its state."""

    @model_validator(mode="after")
    def _has_few_open_units(self) -> Self:
        if sum(each.open_units for each in self.data.values()) > MOST_OPEN:
            raise ValueError(f"data: more than {MOST_OPEN} units are open")
        return self
