"""Block-wise quantization of the base's state to 8-bit codes, and of Δ to 16 bits, in PyTorch.

``csrc/quantize.h`` and ``triton_kernels/quantize.py`` state the same formulas under the same names,
to the bit. A block of neighbours shares a scale. A number is companded by a root that is linear
between powers of 2, then rounded to a multiple of 1/255 (1/127 beside a sign) of the companded
maximum of its block:

    of momenta, int8: q = ±⌊127·∜(|x|/max|x|) + ξ⌋;  of v, uint8: q = ⌊255·⁸√(x/max x) + ξ⌋

Of Δ, int16: q = ±⌊|x|/one + ξ⌋, where one is the power of 2 with 2¹⁴ ≤ max|x|/one < 2¹⁵, so that
codes and back are exact.

ξ in [0, 1) makes the rounding unbiased. It is an additive-recurrence (Kronecker) sequence: each
step adds the golden ratio modulo 1, and each element adds a second irrational number. So an element
is rounded up in the proportion of its fraction over any run of steps, and so are neighbours within
a step. With round-to-nearest v and a momentum would never decay by less than half a code a step;
with independent random ξ the error is 1.2 times as large (benchmarks/state_formats.py). 0 stays 0;
v above 0 has a code of at least 1; a momentum or Δ that is NaN or infinite has the lowest code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formulas import UINT32_MAX, hash32

LARGEST = 2.0**127
"""Larger numbers count as this one, so that no code decodes to infinity."""

TURN = 0x9E3779B9
"""2³² over the golden ratio, by which ξ moves in a step."""

FRACTION_BITS = 12
"""Of a number in units of codes, before it is rounded."""

FRACTION = 1 << FRACTION_BITS

LEAST_POWER = 2.0**-100
"""The least power of 2 by which codes of 16 bits are scaled: no unit is subnormal."""


class Codes(NamedTuple):
    """A format of codes.

    Args:
        dtype: of the codes.
        root: log₂ of the order of the root; 0: a power of 2 is the unit of the codes.
        top: the largest code.
        stride: 2³² times an irrational number, by which ξ moves from element to element.
    """

    dtype: torch.dtype
    root: int
    top: int
    stride: int

    @property
    def signed(self) -> bool:
        """Whether codes have a sign, and the lowest stands for what is not finite."""
        return self.dtype.is_signed

    @property
    def not_a_number(self) -> int:
        """The signed code of what is not finite."""
        return torch.iinfo(self.dtype).min

    @property
    def bias(self) -> int:
        """What the root adds to the shifted bits of a float32, so that 1 stays 1."""
        return (127 << 23) - (127 << 23 >> self.root)


SIGNED = Codes(torch.int8, 2, 127, 0xBB67AE85)  # √3
UNSIGNED = Codes(torch.uint8, 3, 255, 0x6A09E667)  # √2
LINEAR = Codes(torch.int16, 0, 32767, 0xA54FF53A)  # √7

WEIGHT_STRIDE = 0x3C6EF372
"""As ``Codes.stride``, of bfloat16 weights that are rounded by such bits: √5."""

FORMATS = {codes.dtype: codes for codes in (SIGNED, UNSIGNED, LINEAR)}


def compand(x: Tensor, codes: Codes) -> Tensor:
    """Return the root of float32 x ≥ 0, on a line between powers of 2."""
    return ((x.view(torch.int32) >> codes.root) + codes.bias).view(torch.float32)


def expand(r: Tensor, codes: Codes) -> Tensor:
    """Return the inverse of :func:`compand`, exactly; 0 below what 0 is companded to."""
    bits = (r.view(torch.int32) - codes.bias).clamp(min=0)
    return (bits << codes.root).view(torch.float32)


def largest_scale(codes: Codes) -> float:
    """Return the scale of a block whose maximum is LARGEST: no scale is larger."""
    one, _ = block_scale(torch.tensor(LARGEST), codes)
    return float(one)


def block_scale(largest: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return what a code of each block counts, companded, and how many FRACTIONs make 1.

    Args:
        largest: |x| of each block, float32.
    """
    if codes.root == 0:
        # The largest power of 2 that is not above it: that and its inverse are exact.
        power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
        one = power.clamp(min=LEAST_POWER) * 2.0**-14
        return one, torch.full_like(one, FRACTION) / one
    companded = compand(largest, codes)
    # A tensor: torch multiplies by the reciprocal where one side is a number, which rounds twice.
    top = torch.full_like(companded, codes.top)
    # The factor outweighs the rounding of dequantize and quantize: an unchanged x keeps its code.
    return companded / top, top / companded * (FRACTION * (1 + 2.0**-21))


def quantize(x: Tensor, fraction: Tensor | int, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return the codes of blocks and their scales: the companded size of one code.

    Args:
        x: (blocks, elements) float32.
        fraction: ξ of each element in FRACTIONs, below 1; a half rounds to nearest.

    Returns:
        codes as x, and scales (blocks,) float32.
    """
    counts = x.isfinite() if codes.signed else x > 0
    size = torch.where(counts, x.abs().clamp(max=LARGEST), 0.0)
    one, fractions = block_scale(size.amax(-1, keepdim=True), codes)
    q = (compand(size, codes) * fractions).to(torch.int32) + fraction >> FRACTION_BITS
    q = q.clamp(min=0 if codes.signed else 1, max=codes.top if codes.root == 0 else None)
    q = torch.where(size > 0, q, 0)
    if codes.signed:
        q = torch.where(x.isfinite(), torch.where(x < 0, -q, q), codes.not_a_number)
    return q.to(codes.dtype), one.squeeze(-1)


def dequantize(q: Tensor, scale: Tensor, codes: Codes) -> Tensor:
    """Return the float32 numbers of blocks of codes.

    Args:
        q: (blocks, elements) of the codes' dtype.
        scale: (blocks,) float32.
    """
    count = q.to(torch.int32)
    size = expand(count.abs().to(torch.float32) * scale[:, None], codes)
    if not codes.signed:
        return size
    signed = torch.where(count < 0, -size, size)
    return torch.where(count == codes.not_a_number, torch.nan, signed)


def rounding_bits(number: int, step_count: Tensor, element: Tensor, stride: int) -> Tensor:
    """Return ξ of elements in 2⁻³²ths, int64.

    Args:
        number: the weight's number.
        step_count: the steps taken so far.
        element: the elements' indices in the whole weight.
        stride: of what is rounded: ``Codes.stride`` or WEIGHT_STRIDE.
    """
    seed = hash32(torch.tensor(number & UINT32_MAX)).to(element)
    turns = (step_count.to(torch.int64) & UINT32_MAX) * TURN
    return seed + element * stride + turns & UINT32_MAX


def fraction(bits: Tensor) -> Tensor:
    """Return ξ in FRACTIONs, int32."""
    return (bits >> 32 - FRACTION_BITS).to(torch.int32)
