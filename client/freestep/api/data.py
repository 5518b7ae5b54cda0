"""Data sets whose units a run hands out, as JSON: requests, answers, and what of them is part of a run's state."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from freestep.api.validation import LARGEST_INTEGER, Count, InPath, Steps, StrictModel

__all__ = [
    "DATA_NAME",
    "MOST_CLAIMED",
    "MOST_DATA_SETS",
    "MOST_OPEN",
    "MOST_PUSHED",
    "ClaimRequest",
    "Claimed",
    "DataList",
    "DataName",
    "DataProgress",
    "DataSpec",
    "DataState",
    "DataStatus",
    "Holder",
    "PassStatus",
    "Returned",
    "Unit",
]

DATA_NAME = r"[A-Za-z0-9_.-]{1,64}"
"""What the name of a data set matches; it stands in paths and headers, too."""
DataName = Annotated[str, Field(pattern=f"^{DATA_NAME}$"), InPath]
MOST_DATA_SETS = 16
"""Data sets of a run."""
MOST_CLAIMED = 1024
"""Units of one claim."""
MOST_PUSHED = 1024
"""Units of one push."""
MOST_OPEN = 2**20
"""Units of all data sets that may be open before one that has counted: no more can be out, or have come back."""
_MOST_REACHED = 2**52
"""Units that may have counted where passes have no end: so that numbers go on."""


class DataSpec(StrictModel):
    """A data set, cut into units: unit u of a pass is the examples from u * unit on, the last unit may be shorter."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"length": 60000, "unit": 256, "passes": 3}]})

    length: Steps
    """The number of examples."""
    unit: Steps
    """Examples of a unit."""
    passes: Steps | None = 1
    """How often every example is to count; null for no end."""
    shuffle: Literal["blocks", "none"] = "blocks"
    """The order of a pass's units: `blocks`, a permutation of them by seed and pass; `none`, as they lie."""
    seed: Count = 0
    """Of the permutations."""

    @property
    def units(self) -> int:
        """Units of a pass."""
        return -(-self.length // self.unit)

    @property
    def total(self) -> int | None:
        """Units of all passes; None where there is no end."""
        return None if self.passes is None else self.units * self.passes

    @model_validator(mode="after")
    def _has_numbers(self) -> Self:
        if (self.total or 0) > LARGEST_INTEGER:
            raise ValueError(f"all passes have more than {LARGEST_INTEGER} units")
        return self


class DataState(StrictModel):
    """How much of a data set has counted, as part of a run's state: all units before `reached` but those in `open`."""

    spec: DataSpec
    """The data set."""
    reached: Count = 0
    """The number after the highest unit that has counted."""
    open: tuple[tuple[Count, Count], ...] = ()
    """Ranges [begin, end) of the numbers before it whose units have not counted, in ascending order."""

    @property
    def open_units(self) -> int:
        """How many units before `reached` have not counted."""
        return sum(end - begin for begin, end in self.open)

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        bounds = [0, *(bound for each in self.open for bound in each), self.reached]
        if any(begin > end for begin, end in pairwise(bounds)) or any(begin == end for begin, end in self.open):
            raise ValueError("open: must be ranges of numbers below `reached`, none empty, in ascending order")
        if self.open_units > MOST_OPEN:
            raise ValueError(f"open: there are more than {MOST_OPEN} units")
        if self.spec.total is not None and self.reached > self.spec.total:
            raise ValueError(f"reached: the data set has {self.spec.total} units in all passes")
        if self.spec.total is None and self.reached > _MOST_REACHED:
            raise ValueError(f"reached: must be at most {_MOST_REACHED} where passes have no end")
        return self


class ClaimRequest(StrictModel):
    """A request for units, which the lease then holds."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"count": 8}]})

    count: Annotated[int, Field(strict=True, ge=1, le=MOST_CLAIMED)]
    """How many units are wanted, at the most."""


class _Answer(BaseModel):
    """An answer of the service; unknown members, which newer services may add, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Unit(_Answer):
    """A unit of one pass: examples `begin` to `end` of the data set."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    unit: int
    """Its number, which counts on through the passes."""
    # `pass` is a word of Python's.
    of_pass: Annotated[int, Field(alias="pass")]
    """The pass, from 0."""
    begin: int
    """Its first example."""
    end: int
    """The example after its last one."""


class Claimed(_Answer):
    """The units that a claim was given."""

    units: list[Unit]
    """The units, fewer than were asked for where there are no more; none where all that is left is out with others."""
    exhausted: bool
    """Whether every unit of every pass has counted."""


class Returned(_Answer):
    """The units that were given back."""

    units: list[int]
    """The numbers of the units that the lease held, and that are open again."""


class PassStatus(_Answer):
    """A pass that has begun, and of which not all has counted."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    of_pass: Annotated[int, Field(alias="pass")]
    """The pass, from 0."""
    open: int
    """Units that nobody has."""
    out: int
    """Units that workers have."""
    done: int
    """Units that have counted."""


class Holder(_Answer):
    """A worker that has units."""

    worker: str
    """The worker's name."""
    units: int
    """How many it has."""
    oldest_ms: int
    """Milliseconds since it got the one that it has had for the longest."""


class DataStatus(_Answer):
    """A data set of a run at this moment."""

    name: str
    """Its name."""
    spec: DataSpec
    """What it was created with."""
    units: int
    """Units of a pass."""
    open: int | None
    """Units of all passes that nobody has; null if the passes have no end."""
    out: int
    """Units that workers have."""
    done: int
    """Units that have counted, over all passes."""
    examples_done: int
    """Examples that have counted, over all passes."""
    exhausted: bool
    """Whether every unit of every pass has counted."""
    passes_done: int
    """Passes of which every unit has counted."""
    passes: list[PassStatus]
    """The passes that have begun and of which not all has counted, in order, the first hundred of them."""
    holders: list[Holder]
    """The workers that have units, by name."""


class DataList(_Answer):
    """The data sets of a run."""

    data: list[DataStatus]
    """The data sets, by name."""


class DataProgress(_Answer):
    """How much of a data set has counted."""

    done: int
    """Units that have counted, over all passes."""
    total: int | None
    """Units of all passes; null if they have no end."""
    exhausted: bool
    """Whether every unit of every pass has counted."""
