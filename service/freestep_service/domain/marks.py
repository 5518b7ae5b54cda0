"""Units as a push names them, in `Freestep-Units` and in its record: NAME=17,18;OTHER=3."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from freestep.api.data import DATA_NAME, MOST_DATA_SETS, MOST_PUSHED

__all__ = ["LONGEST_MARKS", "MARKS_PATTERN", "NUMBERS_PATTERN", "Marks", "marks_text", "parse_marks", "parse_numbers"]

Marks = Mapping[str, tuple[int, ...]]
"""Name of a data set -> numbers of its units, ascending."""

LONGEST_MARKS = 12_288
"""Characters: so that the head of a request, which is bounded too, has room for more."""
_NUMBER = r"(?:0|[1-9][0-9]{0,15})"
NUMBERS_PATTERN = rf"{_NUMBER}(?:,{_NUMBER})*"
MARKS_PATTERN = rf"{DATA_NAME}={NUMBERS_PATTERN}(?:;{DATA_NAME}={NUMBERS_PATTERN})*"
_NUMBERS = re.compile(NUMBERS_PATTERN)
_MARKS = re.compile(MARKS_PATTERN)


def parse_marks(text: str) -> Marks:
    """Raises ValueError for a text that is none, or names a data set or a unit twice, or too many."""
    if len(text) > LONGEST_MARKS or _MARKS.fullmatch(text) is None:
        raise ValueError
    parts = [part.partition("=") for part in text.split(";")]
    marks = {name: parse_numbers(numbers) for name, _, numbers in parts}
    if len(marks) < len(parts) or len(marks) > MOST_DATA_SETS or sum(map(len, marks.values())) > MOST_PUSHED:
        raise ValueError
    return dict(sorted(marks.items()))


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas, in ascending order. Raises ValueError as `parse_marks` does."""
    if _NUMBERS.fullmatch(text) is None:
        raise ValueError
    numbers = sorted(map(int, text.split(",")))
    if len(set(numbers)) < len(numbers) or len(numbers) > MOST_PUSHED:
        raise ValueError
    return tuple(numbers)


def marks_text(marks: Mapping[str, Iterable[int]]) -> str:
    """The text of marks; the same for the same units that `parse_marks` has read."""
    return ";".join(f"{name}={','.join(map(str, numbers))}" for name, numbers in marks.items())
