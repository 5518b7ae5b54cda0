"""A pytest plugin under which every call of the client is made within `with torch.device("meta")`.

Tests and their closures are not. LocalSteps is left out, since its steps are those of torch's optimizers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from freestep import Client, Flat, HeldLease, Int8, RemoteOptimizer, Rounded, Run, TopK


def _outside(closure: Callable[[], Any]) -> Callable[[], Any]:
    def evaluate() -> Any:
        with torch.device("cpu"):
            return closure()

    return evaluate


def _under_meta(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        if method.__name__ == "step" and len(arguments) > 1:
            arguments = (arguments[0], _outside(arguments[1]), *arguments[2:])
        with torch.device("meta"):
            return method(*arguments, **options)

    return call


for _owner in (Client, Flat, HeldLease, Int8, RemoteOptimizer, Rounded, Run, TopK):
    for _definer in _owner.__mro__:
        if _definer.__module__.startswith("freestep."):
            for _name, _member in list(vars(_definer).items()):
                if inspect.isfunction(_member) and (_name == "__init__" or not _name.startswith("_")):
                    setattr(_definer, _name, _under_meta(_member))
