"""What the control plane's JSON has in common: strict models, ranges of numbers, faults that name their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

__all__ = [
    "LARGEST_INTEGER",
    "Coefficient",
    "Count",
    "Epsilon",
    "Flag",
    "Interpolation",
    "MetricName",
    "NonNegative",
    "Positive",
    "Power",
    "Steps",
    "StrictModel",
    "fault",
    "kinds_of",
    "told_by",
]

LARGEST_INTEGER = 2**53 - 1
"""Beyond it a double, which is what JSON readers and Lua have, skips integers."""

Flag = Annotated[bool, Field(strict=True)]
NonNegative = Annotated[float, Field(strict=True, ge=0, le=1e12)]
"""At most 1e12, so that no coefficient of a step overflows fp32."""
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(strict=True, ge=1e-30, le=1e12)]
"""Not so small that fp32 takes it for zero, which would divide 0 by 0 where a gradient is 0."""
Power = Annotated[float, Field(strict=True, ge=0, le=10)]
"""At most 10, so that Σ (k+1)^r · γ^weight_lr_power stays a double however long the run."""
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST_INTEGER)]
Steps = Annotated[int, Field(strict=True, ge=1, le=LARGEST_INTEGER)]
MetricName = Annotated[str, Field(min_length=1, max_length=128)]
Coefficient = Annotated[float, Field(strict=True, ge=0, lt=1)]
"""A decay rate that may be off: 0 <= value < 1."""
Interpolation = Annotated[float, Field(strict=True, ge=1e-6, lt=1)]
"""Schedule-Free's β: x = y + (1 - 1/β)(z - y) divides by it, and below 1e-6 fp32 keeps nothing of x."""


class StrictModel(BaseModel):
    """What clients send. Unknown members are refused: a misspelt hyperparameter must not train a different model."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def kinds_of(tag: str, union: Any) -> dict[str, Any]:
    """The models of a union by the value of the member that tells them apart."""
    return {kind.model_fields[tag].default: kind for kind in get_args(union)}


def told_by(tag: str, union: Any, default: str | None = None) -> BeforeValidator:
    """Has the member `tag` tell which model of a union a value is, the `default` where it is left out.

    pydantic's own tagged unions do so too, but put the tag into the place of every fault.
    """
    kinds = kinds_of(tag, union)

    def chosen(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        name = value.get(tag, default)
        if not isinstance(name, str) or name not in kinds:
            raise fault((tag,), f"must be one of {', '.join(kinds)}")
        return kinds[name].model_validate(value)

    return BeforeValidator(chosen)


def fault(field: tuple[str | int, ...], message: str) -> ValidationError:
    """A validation error that names a field deeper than the model being validated."""
    reason = PydanticCustomError("invalid", "{message}", {"message": message})
    detail = InitErrorDetails(type=reason, loc=field, input=None)
    return ValidationError.from_exception_data("freestep", [detail])
