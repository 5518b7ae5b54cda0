"""Shared by the models of the JSON API: strict models, ranges of numbers, and errors that name their field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

__all__ = [
    "LARGEST_INTEGER",
    "Coefficient",
    "Count",
    "Epsilon",
    "Flag",
    "InPath",
    "Interpolation",
    "LearningRate",
    "MetricName",
    "NonNegative",
    "Positive",
    "Power",
    "Steps",
    "StrictModel",
    "WarmupSteps",
    "fault",
    "first_fault",
    "kinds_of",
    "reason",
    "told_by",
]

LARGEST_INTEGER = 2**53 - 1
"""The largest integer that JSON readers and Lua, which use doubles, represent exactly."""
_REASONS = {
    "extra_forbidden": "there is no such field",
    "model_attributes_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "tuple_type": "must be a list",
}
"""What is said in place of pydantic's words, which name its own terms, by the type of its error."""

Flag = Annotated[bool, Field(strict=True)]
NonNegative = Annotated[float, Field(strict=True, ge=0, le=1e12)]
"""At most 1e12, so that no coefficient of a step overflows fp32."""
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Power = Annotated[float, Field(strict=True, ge=0, le=10)]
"""At most 10, so that Σ (k+1)^r · γ^weight_lr_power does not overflow a double in any number of steps."""
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST_INTEGER)]
Steps = Annotated[int, Field(strict=True, ge=1, le=LARGEST_INTEGER)]
MetricName = Annotated[str, Field(min_length=1, max_length=128)]
Coefficient = Annotated[float, Field(strict=True, ge=0, lt=1)]
"""A decay rate; 0 turns it off."""
Interpolation = Annotated[float, Field(strict=True, ge=1e-6, lt=1)]
"""Schedule-Free's β: x = y + (1 - 1/β)(z - y) divides by it, and below 1e-6 nothing of x is left in fp32."""
Epsilon = Annotated[
    float,
    Field(
        strict=True, ge=1e-30, le=1e12, description="Added to the denominator of the update, for numerical stability."
    ),
]
"""At least 1e-30: fp32 would round a smaller one to 0, and a gradient of 0 would be divided by 0."""
LearningRate = Annotated[NonNegative, Field(description="The learning rate γ; 0 changes nothing.")]
WarmupSteps = Annotated[
    Count, Field(description="Steps of linear warmup: at step k, counted from 0, lr · min(1, (k+1) / warmup_steps).")
]


def _in_path(name: str) -> str:
    if name in (".", ".."):
        raise ValueError("'.' and '..' are no names, since they say something else in a path")
    return name


InPath = AfterValidator(_in_path)
"""Of a name that stands in paths: clients and proxies would take `/workers/..` for another path."""


class StrictModel(BaseModel):
    """A document that clients send. Unknown members are refused: a misspelt name must not be ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def kinds_of(tag: str, union: Any) -> dict[str, Any]:
    """A union's models by the value of the member that distinguishes them."""
    return {kind.model_fields[tag].default: kind for kind in get_args(union)}


def told_by(tag: str, union: Any, default: str | None = None) -> BeforeValidator:
    """Validates a value as the model of a union that its member `tag` names, or `default` if it has no such member.

    pydantic's tagged unions do so too, but put the tag into the location of every error.
    """
    kinds = kinds_of(tag, union)

    def validate(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        name = value.get(tag, default)
        if not isinstance(name, str) or name not in kinds:
            raise fault((tag,), f"must be one of {', '.join(kinds)}")
        return kinds[name].model_validate(value)

    return BeforeValidator(validate)


def fault(field: tuple[str | int, ...], message: str) -> ValidationError:
    """A validation error of a field below the model that is being validated."""
    kind = PydanticCustomError("invalid", "{message}", {"message": message})
    detail = InitErrorDetails(type=kind, loc=field, input=None)
    return ValidationError.from_exception_data("freestep", [detail])


def first_fault(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """The field that a validation error names first, and what is wrong with it."""
    detail = error.errors(include_url=False)[0]
    return detail["loc"], reason(detail)


def reason(detail: Mapping[str, Any] | ErrorDetails) -> str:
    """What is wrong with a field, of one of the details of a validation error."""
    return _REASONS.get(detail["type"]) or str(detail["msg"]).removeprefix("Value error, ")
