"""The units of a data set, slowly and plainly: what has become of each, number by number."""

from __future__ import annotations

from freestep.api.data import DataSpec

__all__ = ["UnitsTwin"]


class UnitsTwin:
    """A data set whose passes have an end: for each unit its holder, "open" or "done"."""

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec
        self.state = ["open"] * (spec.total or 0)

    def numbers(self, state: str) -> list[int]:
        return [number for number, each in enumerate(self.state) if each == state]

    def claim(self, holder: str, count: int) -> list[int]:
        found = self.numbers("open")[:count]
        for number in found:
            self.state[number] = holder
        return found

    def lacking(self, holder: str, numbers: tuple[int, ...]) -> list[int]:
        """Those that a holder does not have."""
        return [number for number in numbers if number >= len(self.state) or self.state[number] != holder]

    def set(self, numbers: tuple[int, ...] | list[int], state: str) -> None:
        for number in numbers:
            self.state[number] = state

    def open_all_of(self, holder: str) -> None:
        self.set(self.numbers(holder), "open")

    def go_back(self, done: set[int]) -> None:
        """To a state in which these have counted, and nobody has any."""
        self.state = ["done" if number in done else "open" for number in range(len(self.state))]

    def done_by_pass(self) -> list[int]:
        units = self.spec.units
        return [self.state[begin : begin + units].count("done") for begin in range(0, len(self.state), units)]
