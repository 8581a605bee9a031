"""Block-wise quantization of the base's state to 8-bit codes, and of Δ to 16 bits, in Triton.

The formulas of ``mechanic_fused/backends/quantize.py``, which says what they are for, under the
same names. ``TOP`` names the format: 127 that of momenta, 255 that of v, 32,767 that of Δ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mechanic_fused.backends import quantize as definition

from .formulas import divide, is_finite

LARGEST = tl.constexpr(definition.LARGEST)
TURN = tl.constexpr(definition.TURN)
FRACTION_BITS = tl.constexpr(definition.FRACTION_BITS)
FRACTION = tl.constexpr(float(definition.FRACTION))
FRACTIONS = tl.constexpr(definition.FRACTION * (1 + 2.0**-21))
LEAST_POWER = tl.constexpr(definition.LEAST_POWER)
SIGNED_ROOT = tl.constexpr(definition.SIGNED.root)
SIGNED_BIAS = tl.constexpr(definition.SIGNED.bias)
SIGNED_TOP = tl.constexpr(definition.SIGNED.top)
SIGNED_STRIDE = tl.constexpr(definition.SIGNED.stride)
UNSIGNED_ROOT = tl.constexpr(definition.UNSIGNED.root)
UNSIGNED_BIAS = tl.constexpr(definition.UNSIGNED.bias)
UNSIGNED_TOP = tl.constexpr(definition.UNSIGNED.top)
UNSIGNED_STRIDE = tl.constexpr(definition.UNSIGNED.stride)
LINEAR_TOP = tl.constexpr(definition.LINEAR.top)
LINEAR_STRIDE = tl.constexpr(definition.LINEAR.stride)
WEIGHT_STRIDE = tl.constexpr(definition.WEIGHT_STRIDE)


@triton.jit
def compand(x, TOP: tl.constexpr):
    """The root of x ≥ 0, on a line between powers of 2."""
    bits = x.to(tl.int32, bitcast=True)
    if TOP == LINEAR_TOP:
        return x
    elif TOP == SIGNED_TOP:
        return ((bits >> SIGNED_ROOT) + SIGNED_BIAS).to(tl.float32, bitcast=True)
    else:
        return ((bits >> UNSIGNED_ROOT) + UNSIGNED_BIAS).to(tl.float32, bitcast=True)


@triton.jit
def expand(r, TOP: tl.constexpr):
    """The inverse of compand, exactly; 0 below what 0 is companded to."""
    bits = r.to(tl.int32, bitcast=True)
    if TOP == LINEAR_TOP:
        return r
    elif TOP == SIGNED_TOP:
        bits = tl.maximum(bits - SIGNED_BIAS, 0) << SIGNED_ROOT
    else:
        bits = tl.maximum(bits - UNSIGNED_BIAS, 0) << UNSIGNED_ROOT
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def size_of(x, TOP: tl.constexpr):
    """|x| where it counts for the largest of its block, else 0."""
    size = tl.abs(x)
    limited = tl.where(size < LARGEST, size, LARGEST)
    if TOP == UNSIGNED_TOP:
        return tl.where(x > 0, limited, 0.0)
    else:
        return tl.where(is_finite(x), limited, 0.0)


@triton.jit
def range_of(largest, TOP: tl.constexpr):
    """What the codes of a block span: its largest number companded, or the largest power of 2."""
    if TOP == LINEAR_TOP:
        # Not above the largest number: that and its inverse are exact.
        power = largest.to(tl.int32, bitcast=True) & 0x7F800000
        return tl.maximum(power.to(tl.float32, bitcast=True), LEAST_POWER)
    else:
        return compand(largest, TOP)


@triton.jit
def fractions_of(span, TOP: tl.constexpr):
    """How many fractions of a code make 1."""
    if TOP == LINEAR_TOP:
        return divide(span * 0.0 + FRACTION, span * 2.0**-14)
    else:
        # The factor outweighs the rounding of dequantize and quantize: an unchanged x keeps its
        # code.
        return divide(span * 0.0 + TOP, span) * FRACTIONS


@triton.jit
def one_of(span, TOP: tl.constexpr):
    """What a code counts, companded."""
    if TOP == LINEAR_TOP:
        return span * 2.0**-14
    else:
        return divide(span, span * 0.0 + TOP)


@triton.jit
def quantize(x, rounding_bits, block: tl.constexpr, TOP: tl.constexpr):
    """The codes of x, int32, and the scales of its blocks; ``rounding_bits`` round them."""
    BLOCKS: tl.constexpr = x.shape[0] // block
    size = size_of(x, TOP)
    span = range_of(tl.max(tl.reshape(size, (BLOCKS, block)), 1), TOP)
    fractions = fractions_of(span, TOP)
    of_elements = tl.reshape(tl.broadcast_to(fractions[:, None], (BLOCKS, block)), (x.shape[0],))
    count = (compand(size, TOP) * of_elements).to(tl.int32)
    q = (count + (rounding_bits >> (32 - FRACTION_BITS)).to(tl.int32)) >> FRACTION_BITS
    if TOP == UNSIGNED_TOP:
        q = tl.maximum(q, 1)
    elif TOP == LINEAR_TOP:
        q = tl.minimum(q, TOP)
    q = tl.where(size > 0, q, 0)
    if TOP != UNSIGNED_TOP:
        q = tl.where(x < 0, -q, q)
        q = tl.where(is_finite(x), q, -TOP - 1)
    # Last, since registers are scarce.
    return q, one_of(span, TOP)


@triton.jit
def dequantize(q, one, TOP: tl.constexpr):
    """The numbers of codes, int32, with what a code of their block counts, companded."""
    size = expand(tl.abs(q).to(tl.float32) * one, TOP)
    if TOP == UNSIGNED_TOP:
        return size
    else:
        x = tl.where(q < 0, -size, size)
        return tl.where(q == -TOP - 1, float("nan"), x)


@triton.jit
def rounding_bits(seed, element, STRIDE: tl.constexpr):
    """The bits by which elements of a weight are rounded, uint32: a fraction of 1."""
    return seed + element * STRIDE
