"""The JSON about tokens: what is asked of a new one, and what is shown of those that there are."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from freestep.api.token_form import Scope
from freestep.api.validation import LARGEST_INTEGER, StrictModel

__all__ = ["NewToken", "RunPattern", "SignInLink", "TokenList", "TokenRequest", "TokenStatus", "WorkerPattern"]

RunPattern = Annotated[str, Field(pattern=r"^[A-Za-z0-9._*?!\[\]-]{1,128}$")]
"""A pattern of run names, as in shells: `*`, `?`, `[abc]`, `[!abc]`."""
WorkerPattern = Annotated[str, Field(min_length=1, max_length=200)]
_LONGEST_S = 10 * 366 * 24 * 3600
_Bound = Annotated[int, Field(strict=True, ge=0, le=LARGEST_INTEGER)]


class TokenRequest(StrictModel):
    """A request for a token."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "spot-fleet", "scope": "push", "runs": "mnist-*", "expires_in": 604800}],
            # A token that takes no lease is of no worker.
            "if": {"properties": {"scope": {"const": "read"}}},
            "then": {"properties": {"workers": {"type": "null"}}},
        }
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@ -]{0,99}$")]
    """What it is for, as the list and the audit log name it."""
    scope: Scope
    """`read`, `push` or `admin`; each allows what those before it allow."""
    runs: RunPattern = "*"
    """The runs that it is for: a pattern of names, as in shells, such as `mnist-*`."""
    workers: WorkerPattern | None = None
    """The names under which its bearer takes leases: a pattern; null is any."""
    expires_in: Annotated[int, Field(strict=True, ge=1, le=_LONGEST_S)] | None = None
    """Seconds after which it is good no more; null is never."""
    max_runs: _Bound | None = None
    """How many runs that it has created there may be at once; null takes the service's default."""
    max_parameters: _Bound | None = None
    """How many elements their parameters may have in all; null takes the service's default."""
    max_leases: _Bound | None = None
    """How many live leases it may have; null takes the service's default."""
    max_bytes_per_minute: Annotated[_Bound, Field(ge=1)] | None = None
    """How many bytes of tensors it may send and receive in a minute, at each process of the service; null takes the
    service's default."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class TokenStatus(_Answer):
    """A token as it is listed: everything but the token."""

    id: str
    """What it is revoked by."""
    name: str
    """What it is for."""
    scope: Scope
    """`read`, `push` or `admin`."""
    runs: str
    """The pattern of the runs that it is for."""
    workers: str | None = None
    """The pattern of the worker names that it is for; null is any."""
    created_at: str
    """When it was made, in the format of RFC 3339."""
    expires_at: str | None = None
    """When it ends, in the format of RFC 3339; null is never."""
    max_runs: int | None = None
    """How many runs that it has created there may be at once; null is the service's default."""
    max_parameters: int | None = None
    """How many elements their parameters may have in all; null is the service's default."""
    max_leases: int | None = None
    """How many live leases it may have; null is the service's default."""
    max_bytes_per_minute: int | None = None
    """How many bytes of tensors it may move in a minute; null is the service's default."""
    last_used_at: str | None = None
    """When a request carried it last, to within some seconds; null if that is not known."""


class NewToken(TokenStatus):
    """A token that was just made."""

    token: str
    """The token itself, which is shown this once."""


class TokenList(_Answer):
    """The tokens of a service."""

    tokens: list[TokenStatus]
    """Those that were neither revoked nor have expired, oldest first."""


class SignInLink(_Answer):
    """What signs a browser in to the service's dashboard, once."""

    code: str | None
    """What the link has behind `/#sign-in=`; null where the service runs without tokens, and nobody signs in."""
    seconds: int
    """For how long it is good."""
