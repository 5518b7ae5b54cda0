"""All of a run's state that is no vector, as JSON beside the state's vectors."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from freestep.api.control import RunControl
from freestep.api.data import MOST_DATA_SETS, DataName, DataState
from freestep.api.spec import RunSpec
from freestep.api.validation import Count, MetricName, NonNegative, StrictModel

__all__ = ["StateDocument"]

_Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Value = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class StateDocument(StrictModel):
    """A run's spec, where it stands, and the scalars of its optimizer."""

    spec: RunSpec
    """The run's spec, with the number of shards that it was created with."""
    epoch: Count = 0
    """The epoch that the state was read in; a run that takes the state begins another."""
    step: Count
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
