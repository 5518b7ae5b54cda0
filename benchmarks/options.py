"""What every benchmark can be told on the command line."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Options", "parser", "parser_of_sizes"]


@dataclass(frozen=True)
class Options:
    """How `make bench` runs each of its benchmarks.

    quick: fewer runs of smaller models, to see that all of it works.
    plot: where the sweep's plot is written.
    peers_python: interpreters of environments that peers are installed in, beside this one.
    """

    quick: bool = False
    plot: Path | None = None
    peers_python: list[str] = field(default_factory=list)


def parser(description: str | None) -> ArgumentParser:
    """A command's parser, which knows --json."""
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print JSON, for programs")
    return made


def parser_of_sizes(description: str | None, sizes: Collection[int]) -> ArgumentParser:
    """... and --largest, which leaves out models."""
    made = parser(description)
    made.add_argument("--largest", type=int, default=max(sizes), help="leave out sizes above this many parameters")
    return made
