"""The headers of answers, as the OpenAPI document describes them; those of refusals are in `problem_documents`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from freestep.api.models import Receipt
from freestep.wire.spans import SPAN
from freestep_service.web.fields import Kind, choice, flag, integer, pattern, text

__all__ = [
    "CONTENT_RANGE",
    "ETAG",
    "EVENT_STREAM",
    "NEXT_PAGE",
    "NO_STORE",
    "POINT_HEADERS",
    "PREFERENCE_APPLIED",
    "RECEIPT_HEADERS",
    "STATE_HEADERS",
    "AnswerHeader",
    "optional",
]


@dataclass(frozen=True)
class AnswerHeader:
    """A header of answers. is_optional: some answers lack it."""

    name: str
    kind: Kind[Any]
    description: str
    is_optional: bool = False

    def document(self) -> dict[str, Any]:
        """The header as a member of an OpenAPI response's `headers`."""
        return {"description": self.description, "required": not self.is_optional, "schema": dict(self.kind.schema)}


def optional(*headers: AnswerHeader) -> Iterator[AnswerHeader]:
    """Headers of which an answer may lack any."""
    return (replace(each, is_optional=True) for each in headers)


ETAG = AnswerHeader(
    "ETag",
    pattern('"e[0-9]+-s[0-9]+-[a-z]+-[A-Z0-9]+"', "an entity tag"),
    "Epoch, step, what of the run the body is, and its dtype: equal tags mean equal bytes.",
)
_EPOCH = AnswerHeader("Freestep-Epoch", integer(0), "The epoch of the body.")
_STEP = AnswerHeader("Freestep-Step", integer(0), "The step of the body.")
_CUT = AnswerHeader("Freestep-Cut", integer(0), "The place in the run's log that the body is of.")
_RATES = AnswerHeader(
    "Freestep-Scheduled-Lr",
    text(1),
    "The learning rates that the step was made with, by param group, in the order of their first parameters.",
    is_optional=True,
)
_RANGES = AnswerHeader("Accept-Ranges", choice(("bytes",)), "That Range is honoured.")
NEXT_PAGE = AnswerHeader("Link", text(1), "The next page, with the relation `next`: RFC 8288.", is_optional=True)
_SPAN = AnswerHeader(
    "Freestep-Span",
    pattern(SPAN, "BEGIN-END"),
    "Where in the request's memory the answer's body lies; Content-Length is then 0.",
)
_UNCACHED = AnswerHeader("Cache-Control", choice(("no-store",)), "That no cache may keep an answer with a span.")
POINT_HEADERS = (ETAG, _EPOCH, _STEP, _RANGES, _RATES, *optional(_CUT, _SPAN, _UNCACHED))
STATE_HEADERS = (ETAG, _EPOCH, _STEP, _CUT)
CONTENT_RANGE = AnswerHeader(
    "Content-Range", pattern("bytes [0-9]+-[0-9]+/[0-9]+", "a range of bytes"), "The bytes of the whole that follow."
)

_DECISIONS = get_args(Receipt.model_fields["decision"].annotation)
RECEIPT_HEADERS = (
    AnswerHeader("Freestep-Decision", choice(_DECISIONS), "The receipt's `decision`."),
    AnswerHeader("Freestep-Receipt-Step", integer(0), "The receipt's `step`; that of the body may be a later one."),
    AnswerHeader("Freestep-Staleness", integer(0), "The receipt's `staleness`."),
    AnswerHeader("Freestep-Replayed", flag(), "The receipt's `replayed`."),
    AnswerHeader("Freestep-Reason", text(1), "The receipt's `reason`.", is_optional=True),
)
PREFERENCE_APPLIED = AnswerHeader(
    "Preference-Applied", text(1), "Those of the request's preferences that were honoured, RFC 7240.", is_optional=True
)
NO_STORE = AnswerHeader("Cache-Control", choice(("no-store",)), "No cache may keep the token.")
EVENT_STREAM = (
    AnswerHeader("Cache-Control", choice(("no-store",)), "No cache may keep the stream."),
    AnswerHeader("X-Accel-Buffering", choice(("no",)), "A proxy passes on at once what comes."),
)
