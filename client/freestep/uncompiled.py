"""Methods that torch.compile calls as they are: it cannot trace connections, locks and leases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["uncompiled"]

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(method: F) -> F:
    """The method, with a graph break around it where it is called in compiled code."""
    # Imports what every torch optimizer imports when it is made.
    return cast(F, torch.compiler.disable(method))  # type: ignore[no-untyped-call]
