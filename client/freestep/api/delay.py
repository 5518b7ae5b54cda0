"""What the Schedule-Free algorithms do where gradients are applied later than they were taken, as clients name it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from freestep.api.validation import NonNegative, StrictModel, told_by

__all__ = ["Auto", "DelayCorrection", "NoCorrection", "Steady"]


class NoCorrection(StrictModel):
    """The paper's method, however stale the gradients."""

    name: Literal["none"] = "none"


class Auto(StrictModel):
    """Corrects for the staleness that the service sees, and that its live workers let expect."""

    name: Literal["auto"] = "auto"


class Steady(StrictModel):
    """Corrects for one staleness, in steps, whatever is seen. 0 is the paper's method."""

    name: Literal["constant"] = "constant"
    expected_staleness: NonNegative


_Corrections = NoCorrection | Auto | Steady
DelayCorrection = Annotated[_Corrections, Field(discriminator="name"), told_by("name", _Corrections)]
