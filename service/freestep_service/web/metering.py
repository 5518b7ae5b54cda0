"""Bytes of tensors, counted against the quota of the token that moves them."""

from __future__ import annotations

from starlette.requests import Request

from freestep_service.web.context import ServiceContext
from freestep_service.web.guard import caller

__all__ = ["admit_bytes", "spend_bytes"]


def admit_bytes(request: Request, size: int = 0) -> None:
    """Counts a body that is about to be received; without one, asks whether its answer may be sent.

    Raises Overloaded, before anything is read.
    """
    ServiceContext.of(request).registry.quotas.admit_bytes(caller(request))
    spend_bytes(request, size)


def spend_bytes(request: Request, size: int) -> None:
    """Counts bytes that are received or sent."""
    ServiceContext.of(request).registry.quotas.spend_bytes(caller(request), size)
