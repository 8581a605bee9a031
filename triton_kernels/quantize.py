"""8-bit codes of the base's state, by blocks that share a scale, in Triton.

The formulas of ``mechanic_fused/backends/quantize.py``, which says what they are for, under the
same names. ``TOP`` names the format: 127 that of momenta, 255 that of v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mechanic_fused.backends import quantize as definition

from .formulas import divide, hash32, is_finite

LARGEST = tl.constexpr(definition.LARGEST)
NOT_A_NUMBER = tl.constexpr(definition.NOT_A_NUMBER)
TURN = tl.constexpr(definition.TURN)
SIGNED_ROOT = tl.constexpr(definition.SIGNED.root)
SIGNED_BIAS = tl.constexpr(definition.SIGNED.bias)
SIGNED_TOP = tl.constexpr(definition.SIGNED.top)
UNSIGNED_ROOT = tl.constexpr(definition.UNSIGNED.root)
UNSIGNED_BIAS = tl.constexpr(definition.UNSIGNED.bias)
UNSIGNED_TOP = tl.constexpr(definition.UNSIGNED.top)


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
def quantize(x, uniform, block: tl.constexpr, TOP: tl.constexpr):
    """The codes of x, int32, and the scales of its blocks; ``uniform`` rounds, in (0, 1)."""
    BLOCKS: tl.constexpr = x.shape[0] // block
    size = size_of(x, TOP)
    largest = compand(tl.max(tl.reshape(size, (BLOCKS, block)), 1), TOP)
    codes = divide(largest * 0.0 + TOP, largest)
    of_elements = tl.reshape(tl.broadcast_to(codes[:, None], (BLOCKS, block)), (x.shape[0],))
    q = (compand(size, TOP) * of_elements + uniform).to(tl.int32)
    q = tl.minimum(q, TOP)
    if TOP != SIGNED_TOP:
        q = tl.maximum(q, 1)
    q = tl.where(size > 0, q, 0)
    if TOP == SIGNED_TOP:
        q = tl.where(x < 0, -q, q)
        q = tl.where(is_finite(x), q, NOT_A_NUMBER)
    return q, divide(largest, largest * 0.0 + TOP)


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
def random_bits(seed, turn, element, TOP: tl.constexpr):
    """16 random bits for an element's state of a format, uint32."""
    bits = hash32(seed + element)
    if TOP == SIGNED_TOP:
        bits = bits << 16
    return (bits + turn) >> 16


@triton.jit
def uniform_of(bits):
    """The middle of one of 4,096 parts of (0, 1)."""
    return ((bits >> 4).to(tl.float32) + 0.5) * 0.000244140625
