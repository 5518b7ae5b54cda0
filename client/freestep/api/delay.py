"""Corrections of the Schedule-Free algorithms for stale gradients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from freestep.api.validation import NonNegative, StrictModel, told_by

__all__ = ["Ahead", "Auto", "DelayCorrection", "NoCorrection", "Steady"]


class NoCorrection(StrictModel):
    """No correction: the method of the paper (arXiv 2405.15682), whatever the staleness."""

    name: Literal["none"] = "none"


class Auto(StrictModel):
    """Corrects for the staleness that the run expects: a moving average, at least what its live workers cause."""

    name: Literal["auto"] = "auto"


class Steady(StrictModel):
    """Corrects for a fixed staleness."""

    name: Literal["constant"] = "constant"
    expected_staleness: NonNegative
    """The staleness in steps; 0 is the method of the paper."""


class Ahead(StrictModel):
    """Takes gradients ahead of x, and shortens steps only where the method of the paper would be in danger.

    It changes less than `auto`: with time it comes near the method of the paper, if the staleness is at most
    0.3 / (1 - β) - 1 steps.
    """

    name: Literal["ahead"] = "ahead"
    expected_staleness: NonNegative | None = None
    """The staleness in steps; None is what the run expects, as under `auto`."""


_Corrections = NoCorrection | Auto | Steady | Ahead
DelayCorrection = Annotated[
    _Corrections, Field(discriminator="name", json_schema_extra={"required": ["name"]}), told_by("name", _Corrections)
]
