"""The service's answers as models and receipts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, TypeVar

from pydantic import BaseModel, ValidationError

from freestep.api.models import Point, Receipt
from freestep.errors import UnexpectedResponse
from freestep.responses import Answer

if TYPE_CHECKING:
    from torch import Tensor

    _Tensors = dict[str, Tensor]
else:
    _Tensors = dict

__all__ = ["Pulled", "Snapshot", "header", "parse", "receipt", "require_checkpoint"]

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Pulled:
    """The epoch and step of a point that was pulled.

    Args:
        epoch: The run's epoch; it rises when the run goes back to an earlier step.
        step: The number of updates that the point contains.
        point: Which point it is: "x", "y" or "z".
        scheduled_lr: The learning rate that the newest of these updates was made with, for each param group in the
            order of `RunSpec.group_names()`; None before the first update, and from services that do not tell.
    """

    epoch: int
    step: int
    point: Point = "y"
    scheduled_lr: tuple[float, ...] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, answer: Answer, point: Point = "y") -> Self:
        """What an answer's headers say of its point.

        Args:
            answer: An answer whose body is a point.
            point: Which point was asked for.

        Raises:
            UnexpectedResponse: The epoch or the step is missing.
        """
        epoch, step = _integer(answer, "freestep-epoch"), _integer(answer, "freestep-step")
        return cls(epoch, step, point, _scheduled_lr(answer))


class Snapshot(_Tensors):
    """A point's tensors by name, all of one step, and where they are from.

    A dict, so that `model.load_state_dict(x)` and `torch.func.functional_call(model, x, inputs)` take it. Attributes:
    `run`, the run's name; `point`, "x", "y" or "z"; `epoch` and `step`, those of the point.

    Args:
        tensors: The tensors, by their names.
        run: The run's name.
        pulled: Which point they are, and of which epoch and step.
    """

    def __init__(self, tensors: Mapping[str, Tensor], run: str, pulled: Pulled) -> None:
        super().__init__(tensors)
        self.run = run
        self.point = pulled.point
        self.epoch = pulled.epoch
        self.step = pulled.step

    def metadata(self) -> dict[str, str]:
        """Where the tensors are from, as the metadata of a safetensors file."""
        return {
            # As transformers requires.
            "format": "pt",
            "freestep.run": self.run,
            "freestep.epoch": str(self.epoch),
            "freestep.step": str(self.step),
            "freestep.point": self.point,
        }


def parse(model: type[Model], answer: Answer) -> Model:
    """An answer's JSON document as a model. Raises UnexpectedResponse if it is not one."""
    try:
        return model.model_validate(answer.document)
    except ValidationError as error:
        raise UnexpectedResponse(f"the answer is not freestep's: {error}") from error


def receipt(answer: Answer) -> Receipt:
    """A push's receipt: in the headers of an answer whose body is y, else the JSON document.

    Raises UnexpectedResponse if there is none.
    """
    if answer.document is not None:
        return parse(Receipt, answer)
    document = {
        "decision": header(answer, "freestep-decision"),
        "reason": answer.headers.get("freestep-reason"),
        "step": _integer(answer, "freestep-receipt-step"),
        "staleness": _integer(answer, "freestep-staleness"),
        "replayed": header(answer, "freestep-replayed") == "true",
    }
    try:
        return Receipt.model_validate(document)
    except ValidationError as error:
        raise UnexpectedResponse(f"the answer is not freestep's: {error}") from error


def header(answer: Answer, name: str) -> str:
    """A header's value. Raises UnexpectedResponse if it is missing."""
    try:
        return answer.headers[name]
    except KeyError:
        raise UnexpectedResponse(f"the answer is not freestep's: it has no header {name}") from None


def require_checkpoint(step: int, wanted: int | None) -> None:
    """Raises UnexpectedResponse for an answer of another step than that of the checkpoint that was asked for, if one
    was: services of 0.1.0 answer of the run's newest step."""
    if wanted is not None and step != wanted:
        raise UnexpectedResponse(
            f"the service has answered of step {step} and not of the checkpoint of step {wanted}: its version may be "
            "an older one, which reads a checkpoint only to go back to it"
        )


def _integer(answer: Answer, name: str) -> int:
    value = header(answer, name)
    try:
        return int(value)
    except ValueError:
        raise UnexpectedResponse(f"the answer is not freestep's: its header {name} is {value!r}") from None


def _scheduled_lr(answer: Answer) -> tuple[float, ...] | None:
    rates = answer.headers.get("freestep-scheduled-lr")
    try:
        return None if rates is None else tuple(map(float, rates.split(",")))
    except ValueError:
        raise UnexpectedResponse(
            f"the answer is not freestep's: its header freestep-scheduled-lr is {rates!r}"
        ) from None
