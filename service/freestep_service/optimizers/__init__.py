"""The optimization methods, and what carries them over a run's vectors."""

from __future__ import annotations

from freestep_service.optimizers.gradient import Gradient, Pushed
from freestep_service.optimizers.method import Buffers, Conditions, Method, Scalars
from freestep_service.optimizers.methods import method_of
from freestep_service.optimizers.points import interpolate
from freestep_service.optimizers.quanta import Blocks, Quanta, quantize
from freestep_service.optimizers.quantized import Quantized
from freestep_service.optimizers.squares import dequantize, square_sum, widen
from freestep_service.optimizers.sweep import Segment, gather, initial_buffers, segments, step

__all__ = [
    "Blocks",
    "Buffers",
    "Conditions",
    "Gradient",
    "Method",
    "Pushed",
    "Quanta",
    "Quantized",
    "Scalars",
    "Segment",
    "dequantize",
    "gather",
    "initial_buffers",
    "interpolate",
    "method_of",
    "quantize",
    "segments",
    "square_sum",
    "step",
    "widen",
]
