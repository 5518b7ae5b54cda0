"""The optimization methods, by the name that clients send."""

from __future__ import annotations

from freestep_service.optimizers import baselines, schedule_free
from freestep_service.optimizers.method import Buffers, Method, Scalars
from freestep_service.optimizers.points import interpolate
from freestep_service.optimizers.quanta import Blocks, Quanta, quantize
from freestep_service.optimizers.squares import dequantize, square_sum, widen
from freestep_service.optimizers.sweep import Gradient, Segment, gather, initial_buffers, segments, step

__all__ = [
    "METHODS",
    "Blocks",
    "Buffers",
    "Gradient",
    "Method",
    "Quanta",
    "Scalars",
    "Segment",
    "dequantize",
    "gather",
    "initial_buffers",
    "interpolate",
    "quantize",
    "segments",
    "square_sum",
    "step",
    "widen",
]

METHODS = {
    "sgd_schedule_free": schedule_free.SGD,
    "adamw_schedule_free": schedule_free.ADAMW,
    "radam_schedule_free": schedule_free.RADAM,
    "sgd": baselines.SGD,
    "adamw": baselines.ADAMW,
}
