"""The layout of what the processes on one Redis share, as a number: all of them have the same.

It is that of keys and values, of what scripts take them to mean, of messages and entries of the log, of requests that
processes relay to each other, and of files in storage that they share. Version 0.1.0 wrote no number: its layout is 1.

The law of this number: a version whose processes cannot work beside those of the version before raises it.
"""

from __future__ import annotations

from freestep.errors import CoordinatorUnavailable

__all__ = ["LAYOUT", "LayoutInUse", "NewerLayout"]

LAYOUT = 1


class NewerLayout(CoordinatorUnavailable):
    """Redis has the layout of a newer version, so this one writes nothing there."""

    def __init__(self, found: int) -> None:
        super().__init__(
            f"Redis has layout {found}, of a newer version of freestep, and this version knows layout {LAYOUT}: "
            "start that version"
        )


class LayoutInUse(Exception):
    """A live process of an older layout uses the Redis."""

    def __init__(self, url: str) -> None:
        super().__init__(
            f"{url} is a service of an older version of freestep, which cannot work beside this one: end all services "
            f"of that version that share its Redis; this version has layout {LAYOUT}"
        )
