"""The optimization methods, and what carries them over a run's vectors."""

from __future__ import annotations

from freestep_service.optimizers.kernels.gradient import Gradient, Pushed
from freestep_service.optimizers.kernels.points import interpolate
from freestep_service.optimizers.kernels.quanta import Blocks, Quanta, quantize
from freestep_service.optimizers.kernels.quantized import Quantized
from freestep_service.optimizers.kernels.squares import dequantize, square_sum, widen
from freestep_service.optimizers.kernels.sweep import Segment, gather, initial_buffers, segments, step
from freestep_service.optimizers.method import Buffers, Conditions, Method, Scalars
from freestep_service.optimizers.methods.registry import method_of

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
