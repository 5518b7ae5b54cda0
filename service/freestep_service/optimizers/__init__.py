"""The optimization methods, and the loops and kernels that apply them to a run's state vectors.

State is data: flat fp32 vectors [numel] in the order of the run's manifest, and a few scalars for each param group.

    method_of(hyperparameters)      the method: the names of its vectors, its first scalars, its update rule
    initial_buffers, segments       the vectors before the first step; where the param groups lie in them
    step                            moves the vectors one step along a gradient, in place
    gather                          adds a push to a group's accumulator
    trimmed_mean, square_distances  robust means of a group's pushes, and what they need
    interpolate, quantize           writes a point (x, y or z) as fp32, BF16 or F16, or as int8
    square_sum, widen, dequantize   a gradient's square norm, and its conversion to fp32
    fault_of, NEVER_NEGATIVE        what is wrong with scalars from elsewhere; vectors without negative numbers
"""

from __future__ import annotations

from freestep_service.optimizers.kernels.gradient import Gradient, Pushed
from freestep_service.optimizers.kernels.points import interpolate
from freestep_service.optimizers.kernels.quanta import Blocks, Quanta, quantize
from freestep_service.optimizers.kernels.quantized import Quantized
from freestep_service.optimizers.kernels.robust import square_distances, trimmed_mean
from freestep_service.optimizers.kernels.squares import dequantize, square_sum, widen
from freestep_service.optimizers.kernels.sweep import Segment, gather, initial_buffers, segments, step
from freestep_service.optimizers.method import Buffers, Conditions, Method, Scalars
from freestep_service.optimizers.methods.registry import method_of
from freestep_service.optimizers.soundness import NEVER_NEGATIVE, fault_of

__all__ = [
    "NEVER_NEGATIVE",
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
    "fault_of",
    "gather",
    "initial_buffers",
    "interpolate",
    "method_of",
    "quantize",
    "segments",
    "square_distances",
    "square_sum",
    "step",
    "trimmed_mean",
    "widen",
]
