"""The algorithms that a run can have, by name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from freestep.api.averaged import GPASGD, AdamCScheduleFreePlus, GPAAdamW
from freestep.api.baselines import SGD, AdamW, DiLoCo
from freestep.api.schedule_free import (
    LEAST_CORRECTED,
    AdamWScheduleFree,
    RAdamScheduleFree,
    ScheduleFree,
    ScheduleFreeWrapper,
    SGDScheduleFree,
)
from freestep.api.validation import kinds_of, told_by

__all__ = [
    "ALGORITHMS",
    "GPASGD",
    "LEAST_CORRECTED",
    "SGD",
    "AdamCScheduleFreePlus",
    "AdamW",
    "AdamWScheduleFree",
    "DiLoCo",
    "GPAAdamW",
    "OptimizerSpec",
    "RAdamScheduleFree",
    "SGDScheduleFree",
    "ScheduleFree",
    "ScheduleFreeWrapper",
]

_Algorithms = (
    SGDScheduleFree
    | AdamWScheduleFree
    | RAdamScheduleFree
    | ScheduleFreeWrapper
    | AdamCScheduleFreePlus
    | GPAAdamW
    | GPASGD
    | SGD
    | AdamW
    | DiLoCo
)
OptimizerSpec = Annotated[
    _Algorithms,
    Field(discriminator="algorithm", json_schema_extra={"required": ["algorithm"]}),
    told_by("algorithm", _Algorithms),
]

ALGORITHMS: dict[str, type[_Algorithms]] = kinds_of("algorithm", _Algorithms)
"""The hyperparameters' class of each algorithm, by the algorithm's name."""
