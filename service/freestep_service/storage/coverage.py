"""Which parts of a checkpoint are read for a stretch of the run: the shards that wrote them may have had others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from freestep_service.storage.part_manifest import Part

__all__ = ["Chosen", "cover"]


class Chosen(NamedTuple):
    """A part, and the elements of the run, `first` to `last`, that are taken from it."""

    part: Part
    first: int
    last: int


def cover(parts: Iterable[Part], begin: int, end: int) -> list[Chosen]:
    """As few parts as can be that together hold elements `begin` to `end`, in order; none where elements are missing.

    Any one part will do where no elements are asked for: it has the state's scalars.
    """
    candidates = list(parts)
    if begin == end:
        return [Chosen(part, begin, begin) for part in candidates[:1]]
    chosen: list[Chosen] = []
    reached = begin
    while reached < end:
        reaching = [part for part in candidates if part.manifest.begin <= reached < part.manifest.end]
        if not reaching:
            return []
        # Of those that reach equally far, the shortest: a part is read as a whole, for its checksum.
        best = max(reaching, key=lambda part: (min(part.manifest.end, end), part.manifest.begin))
        chosen.append(Chosen(best, reached, min(best.manifest.end, end)))
        reached = best.manifest.end
    return chosen
