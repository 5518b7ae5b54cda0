"""The order in which the units of a pass are handed out: a permutation that is computed, place by place, and not kept.

Version 1. A number u below the number of units is the pair (q, r) with u = q·b + r, where b = ceil(sqrt(units)) and
a = ceil(units / b). It goes through eight rounds of a Feistel network over all a × b pairs (Black and Rogaway, Ciphers
with arbitrary finite domains, CT-RSA 2002): rounds 0, 2, ... add F(round, r) to q modulo a, rounds 1, 3, ... add
F(round, q) to r modulo b. While the result is no number of a unit, it goes through them again.

F(round, v) is mix(key(round) + v), where mix is the finalizer of splitmix64, and key(round) is
mix(mix(mix(seed) + pass) + round), each sum modulo 2^64.

Another version would be another name of `shuffle`, since units that were handed out keep their numbers.

The law of this file: pure functions of integers, the same on every machine.
"""

from __future__ import annotations

from math import isqrt

__all__ = ["UnitOrder"]

_MASK = 2**64 - 1
_ROUNDS = 8


def _mix(value: int) -> int:
    """The finalizer of splitmix64, a permutation of the integers below 2^64."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class UnitOrder:
    """The order of one pass over `units` units, at least one."""

    def __init__(self, units: int, seed: int, number: int) -> None:
        """number: of the pass, from 0."""
        self._units = units
        self._narrow = isqrt(units - 1) + 1
        self._wide = -(-units // self._narrow)
        base = _mix((_mix(seed) + number) & _MASK)
        self._keys = [_mix((base + each) & _MASK) for each in range(_ROUNDS)]

    def unit_at(self, place: int) -> int:
        """The unit that is handed out at a place, both from 0."""
        unit = self._forth(place)
        while unit >= self._units:
            unit = self._forth(unit)
        return unit

    def place_of(self, unit: int) -> int:
        """The place at which a unit is handed out."""
        place = self._back(unit)
        while place >= self._units:
            place = self._back(place)
        return place

    def _forth(self, value: int) -> int:
        high, low = divmod(value, self._narrow)
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                high = (high + _mix((key + low) & _MASK)) % self._wide
            else:
                low = (low + _mix((key + high) & _MASK)) % self._narrow
        return high * self._narrow + low

    def _back(self, value: int) -> int:
        high, low = divmod(value, self._narrow)
        for number in reversed(range(_ROUNDS)):
            key = self._keys[number]
            if number % 2 == 0:
                high = (high - _mix((key + low) & _MASK)) % self._wide
            else:
                low = (low - _mix((key + high) & _MASK)) % self._narrow
        return high * self._narrow + low
