"""When the keys of an issuer are read: for whom, how often, and what becomes of those who wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from freestep.errors import IssuerUnavailable, Unauthenticated
from freestep_service.access.issuer_keys import IssuerKeys
from issuers import key_pair, public_jwk

ONE, TWO = (public_jwk(key_pair("EC", number), kid=name) for number, name in enumerate(("one", "two")))


class Reading:
    """The issuer, which is asked by a coroutine. `gate` holds its answers back."""

    def __init__(self) -> None:
        self.published: list[dict[str, Any]] | None = [ONE]
        self.count = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.now = 0.0
        self.withdrawals = 0
        self.keys = IssuerKeys(self.read, self.withdraw, lambda: self.now)

    async def read(self) -> dict[str, Any]:
        self.count += 1
        await self.gate.wait()
        if self.published is None:
            raise IssuerUnavailable("away")
        return {"keys": self.published}

    def withdraw(self) -> None:
        self.withdrawals += 1


def run(work: Callable[[Reading], Awaitable[None]]) -> None:
    async def begin() -> None:
        await work(Reading())

    asyncio.run(asyncio.wait_for(begin(), 30))


def test_who_comes_while_the_keys_are_read_waits_for_them() -> None:
    async def work(reading: Reading) -> None:
        reading.gate.clear()
        first = asyncio.ensure_future(reading.keys.find("one"))
        await asyncio.sleep(0)
        reading.now += 1
        others = [asyncio.ensure_future(reading.keys.find("one")) for _ in range(10)]
        await asyncio.sleep(0)
        reading.gate.set()
        assert [await each for each in (first, *others)] == [ONE] * 11
        assert reading.count == 1

    run(work)


def test_unknown_keys_are_asked_for_once_in_some_seconds() -> None:
    async def work(reading: Reading) -> None:
        async def find(name: str) -> str:
            try:
                await reading.keys.find(name)
            except (Unauthenticated, IssuerUnavailable) as error:
                return error.slug
            return "found"

        asked = [find(f"invented-{number}") for number in range(50)]
        assert await asyncio.gather(*asked) == ["unauthenticated", *["issuer-unavailable"] * 49]
        assert reading.count == 1
        reading.published = [ONE, TWO]
        reading.now = 9.0
        # It may be one of those that were published since.
        assert [await find(name) for name in ("two", "invented")] == ["issuer-unavailable"] * 2
        assert (await find("one"), reading.count) == ("found", 1)
        reading.now = 10.0
        assert [await find(name) for name in ("two", "one")] == ["found"] * 2
        assert reading.count == 2

    run(work)


def test_keys_that_were_read_outlive_the_issuer() -> None:
    async def work(reading: Reading) -> None:
        await reading.keys.find("one")
        reading.published, reading.now = None, 20.0
        with pytest.raises(IssuerUnavailable, match="does not answer"):
            await reading.keys.find("two")
        reading.now = 25.0
        with pytest.raises(IssuerUnavailable, match="does not answer"):
            await reading.keys.find("two")
        assert await reading.keys.find("one") == ONE
        assert (reading.count, reading.withdrawals) == (2, 0)

    run(work)


@pytest.mark.parametrize(
    ("published", "withdrawals"), [([ONE], 0), ([ONE, TWO], 0), ([TWO], 1), ([], 1), ([{**TWO, "kid": "one"}], 1)]
)
def test_withdrawn_keys_are_told(published: list[dict[str, Any]], withdrawals: int) -> None:
    async def work(reading: Reading) -> None:
        await reading.keys.find("one")
        reading.published, reading.now = published, 20.0
        with pytest.raises(Unauthenticated):
            await reading.keys.find("three")
        assert reading.withdrawals == withdrawals

    run(work)


def test_without_an_id_the_only_key_is_meant() -> None:
    async def work(reading: Reading) -> None:
        assert await reading.keys.find(None) == ONE
        reading.published, reading.now = [ONE, TWO], 20.0
        with pytest.raises(Unauthenticated):
            await reading.keys.find("none")
        reading.now = 40.0
        with pytest.raises(Unauthenticated):
            await reading.keys.find(None)

    run(work)
