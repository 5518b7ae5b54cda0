"""Bytes a minute, under a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from freestep_service.domain.quotas import ByteRates

MOVES = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5000), st.floats(0, 100)), max_size=60)


@given(MOVES, st.integers(1, 2000))
def test_no_token_moves_more_than_its_rate_and_one_body(moves: list[tuple[str, int, float]], per_minute: int) -> None:
    now = 0.0
    rates = ByteRates(lambda: now)
    moved = {"a": 0, "b": 0}
    for token, size, pause in moves:
        now += pause
        if rates.wait_s(token, per_minute) == 0:
            # Before a body is admitted, what was moved is within a minute's burst and what time has given since.
            assert moved[token] < per_minute + now * per_minute / 60 + 1
            rates.spend(token, per_minute, size)
            moved[token] += size


@given(st.integers(1, 10**12), st.integers(1, 10**9))
def test_after_the_wait_there_is_something_left(size: int, per_minute: int) -> None:
    now = 0.0
    rates = ByteRates(lambda: now)
    rates.spend("a", per_minute, size)
    wait = rates.wait_s("a", per_minute)
    assert (wait == 0) == (size < per_minute)
    now += wait * 1.001
    assert rates.wait_s("a", per_minute) == 0
    assert rates.wait_s("b", per_minute) == 0


def test_tokens_that_are_not_used_are_forgotten() -> None:
    now = 0.0
    rates = ByteRates(lambda: now)
    rates.spend("overdrawn", 10, 1000)
    for number in range(20_000):
        now += 0.1
        rates.spend(str(number), 10, 5)
    assert len(rates._buckets) <= 4096
    assert rates.wait_s("overdrawn", 10) > 0
