"""Names of a model's parameters: without what wrappers add, numbered where there are none, and fitted to a run's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from freestep.errors import ManifestMismatch

__all__ = ["are_numbered", "fitted_names", "numbered_names", "plain_names"]

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""The shapes of parameters, by name."""

_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What torch.compile, DataParallel and DistributedDataParallel, FSDP and activation checkpointing put into names."""
_NUMBERED = re.compile(r"group\d+\.\d+")
_MOST_LISTED = 10


def numbered_names(group: int, count: int) -> list[str]:
    """Names for the parameters of a param group that has none."""
    return [f"group{group}.{index}" for index in range(count)]


def are_numbered(names: Iterable[str]) -> bool:
    """True if all names are of `numbered_names`: they fit no model's state_dict."""
    return all(_NUMBERED.fullmatch(name) for name in names)


def plain_names(names: Sequence[str]) -> list[str]:
    """Names without the parts that wrappers add, so that wrapped, compiled and plain models share a run.

    Names that would then not be unique all stay as they are.
    """
    plain = [_plain(name) for name in names]
    return plain if len(set(plain)) == len(set(names)) else list(names)


def _plain(name: str) -> str:
    *path, own = name.split(".")
    return ".".join([*(part for part in path if part not in _WRAPPERS), own])


def fitted_names(shapes: Shapes, expected: Shapes, run: str) -> dict[str, str]:
    """By each local name, the run's: the same name, or, if either side's are numbered, that in the same place.

    Raises ManifestMismatch, which lists what is missing, what the run does not have, and other shapes.

    shapes: of the local parameters, in order. expected: of the run's.
    """
    if shapes == expected:
        return {name: name for name in shapes}
    is_in_order = [*shapes.values()] == [*expected.values()]
    if is_in_order and (are_numbered(shapes) or are_numbered(expected)):
        return dict(zip(shapes, expected, strict=True))
    raise ManifestMismatch(f"the parameters are not those of the run {run!r}: {_difference(shapes, expected)}")


def _difference(shapes: Shapes, expected: Shapes) -> str:
    parts = {
        "missing": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in shapes],
        "not in the run": [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in expected],
        "of other shapes": [
            f"{name} {list(shape)}, in the run {list(expected[name])}"
            for name, shape in shapes.items()
            if shape != expected.get(name, shape)
        ],
    }
    return "; ".join(f"{what}: {_listed(entries)}" for what, entries in parts.items() if entries)


def _listed(entries: Sequence[str]) -> str:
    more = len(entries) - _MOST_LISTED
    return ", ".join(entries[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
