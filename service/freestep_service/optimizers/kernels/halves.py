"""Conversion between fp32 and the 16 bits of BF16 and F16, as torch converts them: branchless, for compiled loops.

Rounding is to nearest, ties to even. NaN stays NaN; as in torch, its payload is lost.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["bf16_bits", "f16_bits", "of_bf16_bits", "of_f16_bits"]

_TO_INFINITY, _TO_ZERO = np.float32(2.0**112), np.float32(2.0**-110)
_F16_SCALE, _HALF = np.float32(2.0**-112), np.float32(0.5)


def bf16_bits(x: Any) -> Any:
    """fp32 -> uint16: the upper half of its bits, rounded."""
    bits = np.float32(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.uint16(rounded) if x == x else np.uint16(0x7FC0)


def of_bf16_bits(half: Any) -> Any:
    """uint16 -> fp32, exact."""
    return np.uint32(np.uint32(half) << 16).view(np.float32)


def f16_bits(x: Any) -> Any:
    """fp32 -> uint16.

    Adding a power of two that leaves just the bits of F16 below the point has the processor round, subnormals included;
    multiplying to and fro before turns what is too large into infinity. The method is Marat Dukhan's, as in torch's
    c10/util/Half.h.
    """
    bits = np.float32(x).view(np.uint32)
    base = (abs(x) * _TO_INFINITY) * _TO_ZERO
    twice = np.uint32(bits << 1)
    bias = max(np.uint32(twice & 0xFF000000), np.uint32(0x71000000))
    rounded = np.float32(np.uint32((bias >> 1) + 0x07800000).view(np.float32) + base).view(np.uint32)
    magnitude = ((rounded >> 13) & 0x7C00) + (rounded & 0xFFF)
    return np.uint16(((bits >> 16) & 0x8000) | (0x7E00 if twice > 0xFF000000 else magnitude))


def of_f16_bits(half: Any) -> Any:
    """uint16 -> fp32, exact; the inverse of the same method."""
    bits = np.uint32(np.uint32(half) << 16)
    twice = np.uint32(bits << 1)
    normal = np.float32(np.uint32((twice >> 4) + 0x70000000).view(np.float32) * _F16_SCALE)
    subnormal = np.float32(np.uint32((twice >> 17) | 0x3F000000).view(np.float32) - _HALF)
    magnitude = np.float32(subnormal if twice < 0x08000000 else normal).view(np.uint32)
    return np.uint32((bits & 0x80000000) | magnitude).view(np.float32)
