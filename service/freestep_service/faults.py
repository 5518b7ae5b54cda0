"""What keeps the service from starting, for whoever starts it."""

from __future__ import annotations

__all__ = ["BadSetting", "CannotStart"]


class CannotStart(Exception):
    """Says in one line what is wrong and what to do about it."""

    exit_code = 1


class BadSetting(CannotStart):
    """A setting is wrong wherever the service is started."""

    exit_code = 2
