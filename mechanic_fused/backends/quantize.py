"""Block-wise quantization of the base's state to 8-bit codes, in PyTorch.

``csrc/quantize.h`` and ``triton_kernels/quantize.py`` state the same formulas under the same names,
to the bit. A block of neighbours shares a scale. A number is companded by a root that is linear
between powers of 2, then rounded to a multiple of 1/255 (1/127 beside a sign) of the companded
maximum of its block:

    of momenta, int8: q = ±⌊127·∜(|x|/max|x|) + ξ⌋;  of v, uint8: q = ⌊255·⁸√(x/max x) + ξ⌋

ξ in [0, 1) makes the rounding unbiased. It is an additive-recurrence (Kronecker) sequence: each
step adds the golden ratio modulo 1, and each element adds a second irrational number. So an element
is rounded up in the proportion of its fraction over any run of steps, and so are neighbours within
a step. With round-to-nearest v and a momentum would never decay by less than half a code a step;
with independent random ξ the error is 1.2 times as large (benchmarks/state_formats.py). 0 stays 0;
v above 0 has a code of at least 1; a momentum that is NaN or infinite has the code −128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formulas import UINT32_MAX, hash32

LARGEST = 2.0**127
"""Larger numbers count as this one, so that no code decodes to infinity."""

NOT_A_NUMBER = -128
"""The signed code of what is not finite."""

TURN = 0x9E3779B9
"""2³² over the golden ratio, by which ξ moves in a step."""

FRACTION_BITS = 12
"""Of a number in units of codes, before it is rounded."""

FRACTION = 1 << FRACTION_BITS


class Codes(NamedTuple):
    """A format of codes.

    Args:
        dtype: of the codes.
        root: log₂ of the order of the root.
        top: the largest code.
        stride: 2³² times an irrational number, by which ξ moves from element to element.
    """

    dtype: torch.dtype
    root: int
    top: int
    stride: int

    @property
    def bias(self) -> int:
        """What the root adds to the shifted bits of a float32, so that 1 stays 1."""
        return (127 << 23) - (127 << 23 >> self.root)


SIGNED = Codes(torch.int8, 2, 127, 0xBB67AE85)  # √3
UNSIGNED = Codes(torch.uint8, 3, 255, 0x6A09E667)  # √2

WEIGHT_STRIDE = 0x3C6EF372
"""As ``Codes.stride``, of bfloat16 weights that are rounded by such bits: √5."""

FORMATS = {codes.dtype: codes for codes in (SIGNED, UNSIGNED)}


def compand(x: Tensor, codes: Codes) -> Tensor:
    """Return the root of float32 x ≥ 0, on a line between powers of 2."""
    return ((x.view(torch.int32) >> codes.root) + codes.bias).view(torch.float32)


def expand(r: Tensor, codes: Codes) -> Tensor:
    """Return the inverse of :func:`compand`, exactly; 0 below what 0 is companded to."""
    bits = (r.view(torch.int32) - codes.bias).clamp(min=0)
    return (bits << codes.root).view(torch.float32)


def largest_scale(codes: Codes) -> float:
    """Return the scale of a block whose maximum is LARGEST: no scale is larger."""
    return float(compand(torch.tensor(LARGEST), codes)) / codes.top


def quantize(x: Tensor, fraction: Tensor | int, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return the codes of blocks and their scales: the companded size of one code.

    Args:
        x: (blocks, elements) float32.
        fraction: ξ of each element in FRACTIONs, below 1; a half rounds to nearest.

    Returns:
        codes as x, and scales (blocks,) float32.
    """
    signed = codes is SIGNED
    counts = x.isfinite() if signed else x > 0
    size = torch.where(counts, x.abs().clamp(max=LARGEST), 0.0)
    largest = compand(size.amax(-1, keepdim=True), codes)
    # A tensor: torch multiplies by the reciprocal where one side is a number, which rounds twice.
    top = torch.full_like(largest, codes.top)
    # The factor outweighs the rounding of dequantize and quantize: an unchanged x keeps its code.
    count = compand(size, codes) * (top / largest * (FRACTION * (1 + 2.0**-21)))
    q = count.to(torch.int32) + fraction >> FRACTION_BITS
    q = torch.where(size > 0, q if signed else q.clamp(min=1), 0)
    if signed:
        q = torch.where(x.isfinite(), torch.where(x < 0, -q, q), NOT_A_NUMBER)
    return q.to(codes.dtype), (largest / top).squeeze(-1)


def dequantize(q: Tensor, scale: Tensor, codes: Codes) -> Tensor:
    """Return the float32 numbers of blocks of codes.

    Args:
        q: (blocks, elements) of the codes' dtype.
        scale: (blocks,) float32.
    """
    count = q.to(torch.int32)
    size = expand(count.abs().to(torch.float32) * scale[:, None], codes)
    if codes is not SIGNED:
        return size
    return torch.where(count == NOT_A_NUMBER, torch.nan, torch.where(count < 0, -size, size))


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
