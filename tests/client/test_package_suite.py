"""The `schedulefree` package's own tests, with the drop-in classes in the place of the package's.

The suite is the installed one. Its reference classes stay the package's, and it asks for a GPU only to put weights on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from schedulefree import test_schedulefree as suite

import freestep
from beside_package import Home, point

CLASSES = [name for name in vars(suite) if name.endswith(("ScheduleFree", "Closure", "Wrapper"))]
TESTS = [name for name in vars(suite) if name.startswith("test_")]


def adapted(kind: Any) -> Any:
    """The class with each parameter's z in `state`, where the suite reads it."""

    class Adapted(kind):  # type: ignore[misc]
        def step(self, *arguments: Any, **options: Any) -> Any:
            result = super().step(*arguments, **options)
            for tensor, z in zip(self._tensors.values(), point(self, "z"), strict=True):
                self.state[tensor]["z"] = z
            return result

    return Adapted


def test_the_suite_is_whole() -> None:
    assert len(TESTS) >= 8
    assert {"SGDScheduleFree", "AdamWScheduleFreeClosure", "RAdamScheduleFree", "ScheduleFreeWrapper"} < set(CLASSES)


@pytest.mark.parametrize("test", TESTS)
def test_it_passes(home: Home, monkeypatch: pytest.MonkeyPatch, test: str) -> None:
    for each in CLASSES:
        monkeypatch.setattr(suite, each, partial(home, adapted(getattr(freestep, each))))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    torch.manual_seed(1)
    getattr(suite, test)()
