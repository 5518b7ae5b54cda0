"""The stock of units: claimed ahead, in numbers that follow how fast they are used."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest

from freestep.api.data import Claimed, Unit
from freestep.api.models import Lease
from freestep.errors import LeaseExpired, ServiceUnreachable
from freestep.unit_stock import UnitStock
from meanwhile import wait_for, wait_until

OLD, NEW = (
    Lease(lease=name, token=1, worker="worker", ttl_ms=1000, epoch=1, step=0) for name in ("old-lease", "new-lease")
)


class Service:
    """Hands out the numbers up to `total`."""

    def __init__(self, total: int) -> None:
        self.total, self.given = total, 0
        self.asked: list[int] = []
        self.refuses = False
        self.lost: set[int] = set()
        """Which claims are not answered, by their numbers."""
        self._last: tuple[str, range] = "", range(0)

    def claim(self, lease: Lease, count: int, wait: float, key: str) -> Claimed:
        self.asked.append(count)
        if self.refuses:
            raise LeaseExpired("the lease has ended")
        numbers = range(self.given, min(self.given + count, self.total))
        if key == self._last[0]:
            numbers = self._last[1]
        self.given, self._last = max(self.given, numbers.stop), (key, numbers)
        if len(self.asked) - 1 in self.lost:
            raise ServiceUnreachable("the answer was lost")
        units: list[Any] = [Unit(unit=each, of_pass=0, begin=each, end=each + 1) for each in numbers]
        return Claimed(units=units, exhausted=False)


class Clock:
    """Goes on by `pace` whenever it is asked."""

    def __init__(self, pace: float) -> None:
        self.now, self.pace = 0.0, pace

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


def take(stock: UnitStock, lease: Lease = OLD) -> int | None:
    taken = stock.take(lease)
    return None if taken is None else taken.unit.unit


@pytest.mark.parametrize(("pace", "most"), [(0.01, 256), (1.0, 1), (10.0, 1)])
def test_claims_are_as_large_as_units_are_used_fast(pace: float, most: int) -> None:
    service = Service(2000)
    stock = UnitStock(service.claim, ahead=True, clock=Clock(pace))
    assert [take(stock) for _ in range(2001)] == [*range(2000), None]
    assert max(service.asked) == most and service.asked[0] == 1


def test_claims_get_smaller_where_units_take_longer() -> None:
    service, clock = Service(10_000), Clock(0.01)
    stock = UnitStock(service.claim, ahead=True, clock=clock)
    for _ in range(1000):
        take(stock)
    clock.pace = 10.0
    for _ in range(3000):
        take(stock)
    assert service.asked[-1] == 1


def test_nothing_is_claimed_ahead_unless_that_is_wanted() -> None:
    service = Service(5)
    stock = UnitStock(service.claim, ahead=False)
    assert [take(stock) for _ in range(3)] == [0, 1, 2]
    assert service.asked == [1, 1, 1] and stock.empty() == []


def test_units_that_an_interrupted_wait_was_for_are_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    service, goes_on = Service(2), threading.Event()

    def claim(lease: Lease, count: int, wait: float, key: str) -> Claimed:
        if service.given:
            wait_for(goes_on, "its claim is waited for")
        return service.claim(lease, count, wait, key)

    def interrupt(future: Future[Any]) -> Any:
        raise KeyboardInterrupt

    stock = UnitStock(claim, ahead=True)
    assert take(stock) == 0
    with monkeypatch.context() as patch:
        patch.setattr("freestep.unit_stock.result_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            take(stock)
    goes_on.set()
    wait_until(lambda: service.given == 2)
    assert take(stock) == 1


@pytest.mark.parametrize(("ahead", "lost"), [(True, {1, 2}), (False, {0, 1})])
def test_units_whose_answer_was_lost_are_handed_out(ahead: bool, lost: set[int]) -> None:
    service = Service(2)
    service.lost = lost
    stock = UnitStock(service.claim, ahead=ahead)
    taken: list[int | None] = []
    while None not in taken:
        with suppress(ServiceUnreachable):
            taken.append(take(stock))
    assert taken == [0, 1, None]
    assert lost < set(range(len(service.asked)))


def test_units_of_another_lease_are_forgotten() -> None:
    service = Service(100)
    stock = UnitStock(service.claim, ahead=True, clock=Clock(0.01))
    for _ in range(20):
        take(stock)
    given = service.given
    fresh = take(stock, NEW)
    assert fresh is not None and fresh >= given


def test_a_claim_ahead_that_fails_is_made_again_when_units_are_needed() -> None:
    service = Service(100)
    stock = UnitStock(service.claim, ahead=True, clock=Clock(1.0))
    service.refuses = True
    with pytest.raises(LeaseExpired):
        take(stock)
    service.refuses = False
    assert take(stock) == 0
    wait_until(lambda: service.given == 2)
    service.refuses = True
    # The unit that was claimed ahead is there; the claim after it fails, and says so to who needs its unit.
    assert take(stock) == 1
    with pytest.raises(LeaseExpired):
        take(stock)
    service.refuses = False
    assert take(stock) == 2


def test_what_is_left_can_be_given_back() -> None:
    service = Service(100)
    stock = UnitStock(service.claim, ahead=True, clock=Clock(0.01))
    used = [take(stock) for _ in range(7)]
    left = [each.unit.unit for each in stock.empty()]
    assert [*used, *left] == list(range(service.given)) and stock.empty() == []
