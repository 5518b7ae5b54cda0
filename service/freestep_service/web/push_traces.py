"""Where a request has its trace, if there is one; what handlers tell of a push."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from starlette.requests import Request

from freestep_service.runs.phases import Phases

__all__ = ["TRACE", "PushTrace", "relaying", "trace_of"]

TRACE = "freestep.trace"
"""The member of a request's scope."""


class PushTrace(Protocol):
    """The trace of a push in this process."""

    phases: Phases | None

    def note(self, **attributes: str | int) -> None:
        """Adds what is known of the push by now."""

    def relaying(self, method: str, url: str, headers: MutableMapping[str, str]) -> AbstractContextManager[None]:
        """While a request to another process is made; its headers say below what that is."""


def trace_of(request: Request) -> PushTrace | None:
    """A request's trace; None where none is wanted."""
    trace: PushTrace | None = request.scope.get(TRACE)
    return trace


def relaying(
    request: Request, method: str, url: str, headers: MutableMapping[str, str]
) -> AbstractContextManager[None]:
    """While another process is asked on behalf of a request."""
    trace = trace_of(request)
    return nullcontext() if trace is None else trace.relaying(method, url, headers)
