"""The headers of the data path, read before any body: claims, preferences, lengths; and those of receipts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from starlette.requests import Request

from freestep.api.data import MOST_PUSHED
from freestep.api.models import Receipt
from freestep.errors import BodyTooLarge, LengthRequired, MalformedRequest, UnsupportedMediaType
from freestep.wire.receiver import MEDIA_TYPE
from freestep.wire.spans import SPAN, Span
from freestep_service.domain.marks import LONGEST_MARKS, MARKS_PATTERN, parse_marks
from freestep_service.domain.records import Claim
from freestep_service.web.fields import Header, Kind, decimal, integer, number, pattern, text
from freestep_service.web.problem_documents import refuses

__all__ = [
    "CLAIM_HEADERS",
    "CONTROL_HEADERS",
    "END_HEADERS",
    "IMPORT_HEADERS",
    "LEASE_ID",
    "LEASE_KIND",
    "PULL_HEADERS",
    "PUSH_HEADERS",
    "RETURN_HEADERS",
    "UPLOAD_HEADERS",
    "Preferences",
    "body_length",
    "claim",
    "claim_key",
    "control_key",
    "end_key",
    "holder",
    "memory",
    "place",
    "preferences",
    "receipt_headers",
    "scheduled_lr",
    "span",
    "upload",
]

_LONGEST_WAIT_S = 600.0
_FEWEST_SAMPLES, _MOST_SAMPLES = 1e-12, 1e12
"""So that no weight in a group's mean, nor its inverse, overflows fp32."""


@dataclass(frozen=True)
class Preferences:
    """A Prefer header, RFC 7240: whether to answer with y, and how many seconds to wait."""

    representation: bool = False
    wait: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Preferences:
        """Ignores unknown preferences, and all but the first of a name, as the RFC asks; a wait is at most ten minutes.
        Raises ValueError."""
        representation, wait = False, 0.0
        for preference in reversed(text.split(",")):
            name, _, value = preference.partition(";")[0].partition("=")
            name, value = name.strip().lower(), value.strip().strip('"')
            if name == "return":
                representation = value == "representation"
            elif name == "wait":
                wait = decimal(value)
                if not isfinite(wait) or wait < 0:
                    raise ValueError
        return cls(representation, min(wait, _LONGEST_WAIT_S))

    def applied(self) -> dict[str, str]:
        """The Preference-Applied header."""
        names = ["return=representation"] if self.representation else []
        if self.wait:
            names.append(f"wait={self.wait:g}")
        return {"Preference-Applied": ", ".join(names)} if names else {}


_ETAG = r'"e([0-9]{1,18})-s([0-9]{1,18})(-[A-Za-z0-9-]+)?"'


def _parse_place(text: str) -> tuple[int, int]:
    """The epoch and step in an ETag (`responses.etag`). Raises ValueError."""
    match = re.fullmatch(_ETAG, text)
    if match is None:
        raise ValueError
    return int(match[1]), int(match[2])


LEASE_ID = r"[A-Za-z0-9_-]{1,200}"
"""What the ID of a lease matches; it stands in paths, too."""
LEASE_KIND = pattern(LEASE_ID, "1 to 200 letters, digits, '_' and '-'")
_TOKEN = pattern(r"[\x21-\x7e]{1,200}", "1 to 200 printable characters without spaces")
_LEASE = Header("Freestep-Lease", LEASE_KIND, "The lease.", required=True)
_FENCE = Header("Freestep-Token", integer(0), "The lease's fencing token.", required=True)
_STEP = Header("Freestep-Step", integer(0), "The step of y at which the gradient was taken.", required=True)
_KEY = Header(
    "Idempotency-Key", _TOKEN, "Makes this one push, however often it is sent.", required=True, example="me-17"
)
_SAMPLES = Header(
    "Freestep-Samples",
    number(
        {"minimum": _FEWEST_SAMPLES, "maximum": _MOST_SAMPLES},
        lambda samples: _FEWEST_SAMPLES <= samples <= _MOST_SAMPLES,
        f"a number from {_FEWEST_SAMPLES:g} to {_MOST_SAMPLES:g}",
    ),
    "Samples behind the gradient: its weight in a group's mean.",
)
_LOSS = Header("Freestep-Loss", number({}, lambda _: True, "a finite number"), "The training loss of the batch.")
_SPEED = Header(
    "Freestep-Speed",
    number({"exclusiveMinimum": 0}, lambda speed: speed > 0, "a finite number above 0"),
    "Local steps a second of the worker; its lease shows them.",
)
_UNITS = Header(
    "Freestep-Units",
    Kind(
        {"type": "string", "pattern": f"^{MARKS_PATTERN}$", "maxLength": LONGEST_MARKS},
        parse_marks,
        f"data sets and numbers of their units, as NAME=17,18;OTHER=3: at most {MOST_PUSHED} numbers, and no name or "
        "number twice",
    ),
    "The units of data sets that the gradient was taken on: they count if it does.",
    example="train=17,18",
)
_PREFER = Header(
    "Prefer",
    Kind({"type": "string"}, Preferences.parse, "a list of preferences, with wait=S in seconds from 0"),
    "RFC 7240: wait=S, in seconds; for pushes also return=representation.",
    example="return=representation, wait=1",
    is_list=True,
)
_UPLOAD = Header(
    "Idempotency-Key",
    _TOKEN,
    "Makes this one upload, however often it is sent. With several shards, its parts have one key.",
)
_IMPORT = Header("Idempotency-Key", _TOKEN, "Makes this one import, however often it is sent.")
_CLAIM = Header("Idempotency-Key", _TOKEN, "A claim that comes again, with no other between, is given the same units.")
_CHANGE = Header(
    "Idempotency-Key", _TOKEN, "Makes this one change: where it comes again, nothing that was changed since is undone."
)
_RETURN = Header("Idempotency-Key", _TOKEN, "A return that comes again, with no other between, is answered alike.")
_END = Header(
    "Idempotency-Key", _TOKEN, "Where the request comes again soon, it is answered alike, and changes nothing."
)
_PLACE = Header(
    "If-Match",
    Kind({"type": "string", "pattern": f"^{_ETAG}$"}, _parse_place, "an ETag of the run's state or of its points"),
    "Imports only while the run is at the epoch and step that the ETag is of.",
    example='"e1-s40-state-F32"',
)
_LENGTH = Header("Content-Length", integer(0))
_MEMORY = Header(
    "Freestep-Memory",
    pattern("[0-9a-f]{32}", "the name of a memory, 32 hexadecimal digits"),
    "The memory that the client shares with the service; an answer with tensors may be written into it.",
)
_SPAN = Header(
    "Freestep-Span",
    Kind({"type": "string", "pattern": f"^{SPAN}$"}, Span.parse, "BEGIN-END, of which the first is not larger"),
    "Where in that memory the body lies: from byte BEGIN to END, that one excluded. Content-Length is then 0.",
)

PUSH_HEADERS = (_LEASE, _FENCE, _STEP, _KEY, _SAMPLES, _LOSS, _SPEED, _UNITS, _PREFER, _MEMORY, _SPAN)
CONTROL_HEADERS = (_CHANGE,)
CLAIM_HEADERS = (_LEASE, _FENCE, _CLAIM, _PREFER)
RETURN_HEADERS = (_LEASE, _FENCE, _RETURN)
END_HEADERS = (_END,)
UPLOAD_HEADERS = (_UPLOAD,)
IMPORT_HEADERS = (_IMPORT, _PLACE)
PULL_HEADERS = (
    _PREFER,
    Header("If-None-Match", text(), "Answers 304 while the point's ETag is the one named."),
    Header("Range", text(), "Bytes of the body to answer with, as after a cut download.", example="bytes=0-99"),
    Header("If-Range", text(), "Honours Range only while the point's ETag is the one named."),
    _MEMORY,
)


def preferences(request: Request) -> Preferences:
    """Raises MalformedRequest."""
    return _PREFER.find(request) or Preferences()


@refuses(UnsupportedMediaType, LengthRequired, MalformedRequest, BodyTooLarge)
def body_length(request: Request, limit: int, span: Span | None = None) -> int:
    """The Content-Length of a body of tensors, in bytes; where it lies in memory, that of its span.

    Raises UnsupportedMediaType, LengthRequired, MalformedRequest, and BodyTooLarge past `limit` bytes.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != MEDIA_TYPE:
        raise UnsupportedMediaType
    length = _LENGTH.find(request)
    if length is None or "transfer-encoding" in request.headers:
        raise LengthRequired
    if span is not None:
        if length:
            raise MalformedRequest(f"the body lies in {_MEMORY.name}, and Content-Length is not 0", field=_SPAN.name)
        length = span.length
    if length > limit:
        raise BodyTooLarge(f"the body has {length} bytes, and {limit} are accepted", limit=limit)
    return length


def memory(request: Request) -> str | None:
    """The name of the memory that the client shares. Raises MalformedRequest."""
    return _MEMORY.find(request)


def span(request: Request) -> Span | None:
    """Where in that memory a push's body lies, if it does. Raises MalformedRequest."""
    found = _SPAN.find(request)
    if found is not None and memory(request) is None:
        raise MalformedRequest(f"{_SPAN.name} needs {_MEMORY.name}, the memory that the body lies in", field=_SPAN.name)
    return found


def place(request: Request) -> tuple[int, int] | None:
    """The epoch and step that an If-Match header names. Raises MalformedRequest."""
    return _PLACE.find(request)


def upload(request: Request, *, required: bool) -> str | None:
    """The key of the upload that a body or a part belongs to. Raises MalformedRequest."""
    return _KEY.read(request) if required else _UPLOAD.find(request)


def claim(request: Request) -> Claim:
    """A push's claim. Raises MalformedRequest, naming the header."""
    return Claim(
        lease=_LEASE.read(request),
        token=_FENCE.read(request),
        step=_STEP.read(request),
        key=_KEY.read(request),
        samples=_SAMPLES.find(request),
        loss=_LOSS.find(request),
        speed=_SPEED.find(request),
        units=_UNITS.find(request) or {},
    )


def holder(request: Request) -> tuple[str, int]:
    """The lease that units are for, and its fencing token. Raises MalformedRequest, naming the header."""
    return _LEASE.read(request), _FENCE.read(request)


def claim_key(request: Request) -> str:
    """The key of a claim of units; empty where it has none. Raises MalformedRequest."""
    return _CLAIM.find(request) or ""


def return_key(request: Request) -> str:
    """The key of a return of units; empty where it has none. Raises MalformedRequest."""
    return _RETURN.find(request) or ""


def end_key(request: Request) -> str:
    """The key of a request that ends a worker; empty where it has none. Raises MalformedRequest."""
    return _END.find(request) or ""


def control_key(request: Request) -> str:
    """The key of a change of a run; empty where it has none. Raises MalformedRequest."""
    return _CHANGE.find(request) or ""


def receipt_headers(receipt: Receipt) -> dict[str, str]:
    """A receipt as headers, beside a body; `Freestep-Step` is the body's own, so the receipt's has another name."""
    headers = {
        "Freestep-Decision": receipt.decision,
        "Freestep-Receipt-Step": str(receipt.step),
        "Freestep-Staleness": str(receipt.staleness),
        "Freestep-Replayed": str(receipt.replayed).lower(),
    }
    if receipt.reason:
        headers["Freestep-Reason"] = receipt.reason
    return headers


def scheduled_lr(rates: Iterable[float]) -> str:
    """The Freestep-Scheduled-Lr header: the learning rates of a step, by param group, in their shortest form."""
    return ",".join(map(repr, rates))
