"""Between reception and commit: the tensors of a body become one fp32 vector, of which it is known how long it is."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from math import isfinite, sqrt

from freestep.wire import Manifest
from freestep_service.optimizers import square_sum, widen
from freestep_service.shard import DTYPES
from freestep_service.vectors import Vector

__all__ = ["widen_and_measure"]


def widen_and_measure(
    vector: Vector, manifest: Manifest, dtypes: Mapping[str, str], *, exact: bool = False
) -> float | None:
    """Makes all tensors fp32 in place; returns the 2-norm of the whole, or None when it is not finite.

    A narrow tensor lies right-aligned in its slot. The norm is exact, whether it has to be or not.
    """
    wide = vector.tensor()
    total = 0.0
    for dtype, members in groupby(manifest.slots, key=lambda slot: dtypes[slot.name]):
        run = list(members)
        if dtype == "F32":
            total += square_sum(wide[run[0].offset : run[-1].offset + run[-1].numel])
            continue
        for slot in run:
            place = wide[slot.offset : slot.offset + slot.numel]
            total += widen(place.view(DTYPES[dtype])[slot.numel :], place)
    return sqrt(total) if isfinite(total) else None
