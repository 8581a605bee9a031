"""Block-wise quantization of the base's state to 8-bit codes, in Triton.

The formulas of ``mechanic_fused/backends/quantize.py``, which says what they are for, under the
same names. ``TOP`` names the format: 127 that of momenta, 255 that of v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mechanic_fused.backends import quantize as definition

from .formulas import divide, is_finite

LARGEST = tl.constexpr(definition.LARGEST)
NOT_A_NUMBER = tl.constexpr(definition.NOT_A_NUMBER)
TURN = tl.constexpr(definition.TURN)
FRACTION_BITS = tl.constexpr(definition.FRACTION_BITS)
FRACTIONS = tl.constexpr(definition.FRACTION * (1 + 2.0**-21))
SIGNED_ROOT = tl.constexpr(definition.SIGNED.root)
SIGNED_BIAS = tl.constexpr(definition.SIGNED.bias)
SIGNED_TOP = tl.constexpr(definition.SIGNED.top)
SIGNED_STRIDE = tl.constexpr(definition.SIGNED.stride)
UNSIGNED_ROOT = tl.constexpr(definition.UNSIGNED.root)
UNSIGNED_BIAS = tl.constexpr(definition.UNSIGNED.bias)
UNSIGNED_TOP = tl.constexpr(definition.UNSIGNED.top)
UNSIGNED_STRIDE = tl.constexpr(definition.UNSIGNED.stride)
WEIGHT_STRIDE = tl.constexpr(definition.WEIGHT_STRIDE)


@triton.jit
def compand(x, TOP: tl.constexpr):
    """The root of x ≥ 0, on a line between powers of 2."""
    bits = x.to(tl.int32, bitcast=True)
    if TOP == SIGNED_TOP:
        return ((bits >> SIGNED_ROOT) + SIGNED_BIAS).to(tl.float32, bitcast=True)
    else:
        return ((bits >> UNSIGNED_ROOT) + UNSIGNED_BIAS).to(tl.float32, bitcast=True)


@triton.jit
def expand(r, TOP: tl.constexpr):
    """The inverse of compand, exactly; 0 below what 0 is companded to."""
    bits = r.to(tl.int32, bitcast=True)
    if TOP == SIGNED_TOP:
        bits = tl.maximum(bits - SIGNED_BIAS, 0) << SIGNED_ROOT
    else:
        bits = tl.maximum(bits - UNSIGNED_BIAS, 0) << UNSIGNED_ROOT
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def size_of(x, TOP: tl.constexpr):
    """|x| where it counts for the largest of its block, else 0."""
    size = tl.abs(x)
    limited = tl.where(size < LARGEST, size, LARGEST)
    if TOP == SIGNED_TOP:
        return tl.where(is_finite(x), limited, 0.0)
    else:
        return tl.where(x > 0, limited, 0.0)


@triton.jit
def quantize(x, rounding_bits, block: tl.constexpr, TOP: tl.constexpr):
    """The codes of x, int32, and the scales of its blocks; ``rounding_bits`` round them."""
    BLOCKS: tl.constexpr = x.shape[0] // block
    size = size_of(x, TOP)
    largest = compand(tl.max(tl.reshape(size, (BLOCKS, block)), 1), TOP)
    top = largest * 0.0 + TOP
    # The factor outweighs the rounding of dequantize and quantize: an unchanged x keeps its code.
    fractions = divide(top, largest) * FRACTIONS
    of_elements = tl.reshape(tl.broadcast_to(fractions[:, None], (BLOCKS, block)), (x.shape[0],))
    count = (compand(size, TOP) * of_elements).to(tl.int32)
    q = (count + (rounding_bits >> (32 - FRACTION_BITS)).to(tl.int32)) >> FRACTION_BITS
    if TOP != SIGNED_TOP:
        q = tl.maximum(q, 1)
    q = tl.where(size > 0, q, 0)
    if TOP == SIGNED_TOP:
        q = tl.where(x < 0, -q, q)
        q = tl.where(is_finite(x), q, NOT_A_NUMBER)
    return q, divide(largest, top)


@triton.jit
def dequantize(q, one, TOP: tl.constexpr):
    """The numbers of codes, int32, with what a code of their block counts, companded."""
    size = expand(tl.abs(q).to(tl.float32) * one, TOP)
    if TOP == SIGNED_TOP:
        x = tl.where(q < 0, -size, size)
        return tl.where(q == NOT_A_NUMBER, float("nan"), x)
    else:
        return size


@triton.jit
def rounding_bits(seed, element, STRIDE: tl.constexpr):
    """The bits by which elements of a weight are rounded, uint32: a fraction of 1."""
    return seed + element * STRIDE
