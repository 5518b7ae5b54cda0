"""What requests say in their headers, read before any body: claims, preferences, lengths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite

from starlette.requests import Request

from freestep.api.models import Receipt
from freestep.errors import BodyTooLarge, LengthRequired, MalformedRequest, UnsupportedMediaType
from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.domain.records import Claim

__all__ = ["Preferences", "body_length", "claim", "preferences", "receipt_headers", "upload"]

_LONGEST_WAIT_S = 600.0
_FEWEST_SAMPLES, _MOST_SAMPLES = 1e-12, 1e12
"""So that no weight in a group's mean, nor its inverse, overflows fp32."""
_INTEGER = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_TOKEN = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True)
class Preferences:
    """A Prefer header, RFC 7240: what to answer with, and how many seconds to wait."""

    representation: bool = False
    wait: float = 0.0

    def applied(self) -> dict[str, str]:
        """The Preference-Applied header that says they were honoured."""
        names = ["return=representation"] if self.representation else []
        if self.wait:
            names.append(f"wait={self.wait:g}")
        return {"Preference-Applied": ", ".join(names)} if names else {}


def preferences(request: Request) -> Preferences:
    """Unknown preferences are ignored, as the RFC asks; a wait is at most ten minutes."""
    representation, wait = False, 0.0
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        name, value = name.strip().lower(), value.strip().strip('"')
        if name == "return":
            representation = value == "representation"
        elif name == "wait":
            wait = _number("Prefer: wait", value)
            if wait < 0:
                raise MalformedRequest("Prefer: wait is negative", field="Prefer")
    return Preferences(representation, min(wait, _LONGEST_WAIT_S))


def body_length(request: Request, limit: int) -> int:
    """The Content-Length of a body of tensors.

    Raises UnsupportedMediaType, LengthRequired, MalformedRequest, and BodyTooLarge past `limit` bytes.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != MEDIA_TYPE:
        raise UnsupportedMediaType
    text = request.headers.get("content-length")
    if text is None or "transfer-encoding" in request.headers:
        raise LengthRequired
    length = _integer("Content-Length", text)
    if length > limit:
        raise BodyTooLarge(f"the body has {length} bytes, and {limit} are accepted", limit=limit)
    return length


def upload(request: Request, *, required: bool) -> str | None:
    """Which upload of initial weights a part is of. Raises MalformedRequest."""
    if not required and "idempotency-key" not in request.headers:
        return None
    return _token(request, "Idempotency-Key")


def claim(request: Request) -> Claim:
    """A push's claim. Raises MalformedRequest, naming the header."""
    samples, speed = request.headers.get("freestep-samples"), request.headers.get("freestep-speed")
    loss = request.headers.get("freestep-loss")
    parsed = Claim(
        lease=_token(request, "Freestep-Lease"),
        token=_integer("Freestep-Token", _token(request, "Freestep-Token")),
        step=_integer("Freestep-Step", _token(request, "Freestep-Step")),
        key=_token(request, "Idempotency-Key"),
        samples=None if samples is None else _number("Freestep-Samples", samples),
        loss=None if loss is None else _number("Freestep-Loss", loss),
        speed=None if speed is None else _number("Freestep-Speed", speed),
    )
    if parsed.step < 0:
        raise MalformedRequest("Freestep-Step is negative", field="Freestep-Step")
    if parsed.samples is not None and not _FEWEST_SAMPLES <= parsed.samples <= _MOST_SAMPLES:
        raise MalformedRequest(
            f"Freestep-Samples is not between {_FEWEST_SAMPLES:g} and {_MOST_SAMPLES:g}", field="Freestep-Samples"
        )
    if parsed.speed is not None and parsed.speed <= 0:
        raise MalformedRequest("Freestep-Speed is not above 0", field="Freestep-Speed")
    return parsed


def receipt_headers(receipt: Receipt) -> dict[str, str]:
    """A receipt beside a body; `Freestep-Step` is the body's own, so the receipt's has a name of its own."""
    headers = {
        "Freestep-Decision": receipt.decision,
        "Freestep-Receipt-Step": str(receipt.step),
        "Freestep-Staleness": str(receipt.staleness),
        "Freestep-Replayed": str(receipt.replayed).lower(),
    }
    if receipt.reason:
        headers["Freestep-Reason"] = receipt.reason
    return headers


def _token(request: Request, name: str) -> str:
    values = request.headers.getlist(name)
    if len(values) != 1 or not _TOKEN.fullmatch(values[0].strip()):
        raise MalformedRequest(f"the header {name} is needed once, as printable characters", field=name)
    return values[0].strip()


def _integer(name: str, text: str) -> int:
    if not _INTEGER.fullmatch(text.strip()):
        raise MalformedRequest(f"{name} is not an integer", field=name)
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise MalformedRequest(f"{name} is not a finite number", field=name)
    return number
