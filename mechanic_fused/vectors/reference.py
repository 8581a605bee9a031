"""The vector ops in plain PyTorch: the definition of correct.

Each works on the streams of one ``VectorBucket``: lists with a tensor a weight.
Elementwise arithmetic is in float32 (float64 for float64 weights) with one rounding an operation,
sums are of float64 products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.layout import CPU_CHUNK

Stream = list[Tensor]

CHUNK = {"cpu": CPU_CHUNK, "cuda": CPU_CHUNK}


class AdaRemOptions(NamedTuple):
    """AdaRem's numbers in one step: ``boost`` is λᵗ, ``decay`` the weight decay."""

    lr: float
    beta: float
    boost: float
    decay: float
    eps: float


def step_along(part: Any, x: Stream, w: Stream, d: Stream, c: Tensor) -> None:
    """x = round(w − c·d); c is one float64 number on the device, rounded to d's dtype."""
    for x_i, w_i, d_i in zip(x, w, d, strict=True):
        x_i.copy_(w_i.to(part.compute_dtype) - c.to(part.compute_dtype) * d_i)


def axpby(part: Any, s: Stream, x: Stream, a: float, c: float) -> None:
    """s = a·s + c·x; where a = 0 s is not read."""
    for s_i, x_i in zip(s, x, strict=True):
        fresh = c * x_i.to(part.compute_dtype)
        s_i.copy_(a * s_i + fresh if a else fresh)


def difference_dots(part: Any, s: Stream, a: Stream, b: Stream) -> Tensor:
    """s' = a − b; returns s'·s and s'·s', and s takes s'."""
    sums = part.zeros(2)
    for s_i, a_i, b_i in zip(s, a, b, strict=True):
        fresh = a_i.to(part.compute_dtype) - b_i.to(part.compute_dtype)
        sums[0] += dot(fresh, s_i)
        sums[1] += dot(fresh, fresh)
        s_i.copy_(fresh)
    return sums


def dots(part: Any, g: Stream, l: Stream, p: Stream) -> Tensor:  # noqa: E741
    """Return g·g, g·l, l·l and g·p."""
    sums = part.zeros(4)
    for g_i, l_i, p_i in zip(g, l, p, strict=True):
        sums += torch.stack([dot(g_i, g_i), dot(g_i, l_i), dot(l_i, l_i), dot(g_i, p_i)])
    return sums


def abs_max(part: Any, a: Stream) -> Tensor:
    """Return max|a| of each weight, float64, 0 of an empty one."""
    found = [a_i.abs().max().double() if a_i.numel() else part.zeros(1)[0] for a_i in a]
    return torch.stack(found)


def adarem(
    part: Any, x: Stream, g: Stream, m: Stream, peaks: Tensor, options: AdaRemOptions
) -> Tensor:
    """b = sign(g)·m/(max|m| + ε); x = round(x − lr·((1 + λᵗ·b)·g + decay·x)); m = β·m + (1−β)·g.

    Args:
        peaks: max|m| of each weight, float64.

    Returns:
        max|m| of the new m. An element of g that is not finite counts as 0.
    """
    o, wide = options, part.compute_dtype
    # Not boost / tensor, which torch takes as boost times a reciprocal: two roundings.
    reach = (torch.full_like(peaks, o.boost) / (peaks + o.eps)).to(wide)
    for i, (x_i, g_i, m_i) in enumerate(zip(x, g, m, strict=True)):
        finite = g_i.to(wide)
        finite = torch.where(finite.isfinite(), finite, 0.0)
        adjusted = (1 + reach[i] * (finite.sign() * m_i)) * finite
        wide_x = x_i.to(wide)
        m_i.copy_(o.beta * m_i + (1 - o.beta) * finite)
        x_i.copy_(wide_x + -(o.lr * (adjusted + o.decay * wide_x)))
    return abs_max(part, m)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum()
