"""Every target is given its seeds, and inputs that are made of them: the same ones each time."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.target import TARGETS, target_of

_EXAMPLES = {"connection": 200, "tensors": 1000}
"""Where an input takes more or less time than elsewhere."""
_OTHERS = 300


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    target = target_of(name)
    for seed in target.seeds:
        target.check(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_made_of_them(name: str) -> None:
    target = target_of(name)

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=_EXAMPLES.get(name, _OTHERS),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def check(data: bytes) -> None:
        target.check(data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_noise(name: str) -> None:
    target = target_of(name)

    @settings(derandomize=True, database=None, deadline=None, max_examples=100)
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        target.check(data)

    check()
