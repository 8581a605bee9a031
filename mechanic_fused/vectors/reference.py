"""The vector ops in plain PyTorch: the definition of correct.

Each op works on the streams of one :class:`mechanic_fused.vectors.space.VectorBucket`; a stream is
a list with one tensor per weight. Elementwise arithmetic is in float32 (float64 for float64
weights) and rounds once per operation; sums are of float64 products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..backends.layout import CPU_CHUNK

if TYPE_CHECKING:
    from .space import VectorBucket

Stream = list[Tensor]

CHUNK = {"cpu": CPU_CHUNK, "cuda": CPU_CHUNK}
"""Device → elements of a chunk. No op here reads the chunk table."""


class AdaRemOptions(NamedTuple):
    """The coefficients of one step of AdaRem; ``lam_t`` is λᵗ."""

    lr: float
    beta: float
    lam_t: float
    weight_decay: float
    eps: float


def step_along(bucket: VectorBucket, x: Stream, w: Stream, d: Stream, c: Tensor) -> None:
    """x = round(w − c·d); c is a 0-dim float64 tensor on the device, rounded to d's dtype."""
    for x_i, w_i, d_i in zip(x, w, d, strict=True):
        x_i.copy_(w_i.to(bucket.compute_dtype) - c.to(bucket.compute_dtype) * d_i)


def axpby(bucket: VectorBucket, s: Stream, x: Stream, a: float, c: float) -> None:
    """s = a·s + c·x; with a = 0, s is not read."""
    for s_i, x_i in zip(s, x, strict=True):
        term = c * x_i.to(bucket.compute_dtype)
        s_i.copy_(a * s_i + term if a else term)


def difference_dots(bucket: VectorBucket, s: Stream, a: Stream, b: Stream) -> Tensor:
    """Return s'·s and s'·s' for s' = a − b, which then replaces s."""
    sums = bucket.zeros(2)
    for s_i, a_i, b_i in zip(s, a, b, strict=True):
        difference = a_i.to(bucket.compute_dtype) - b_i.to(bucket.compute_dtype)
        sums[0] += dot(difference, s_i)
        sums[1] += dot(difference, difference)
        s_i.copy_(difference)
    return sums


def dots(bucket: VectorBucket, g: Stream, l: Stream, p: Stream) -> Tensor:  # noqa: E741
    """Return g·g, g·l, l·l and g·p."""
    sums = bucket.zeros(4)
    for g_i, l_i, p_i in zip(g, l, p, strict=True):
        sums += torch.stack([dot(g_i, g_i), dot(g_i, l_i), dot(l_i, l_i), dot(g_i, p_i)])
    return sums


def abs_max(bucket: VectorBucket, a: Stream) -> Tensor:
    """Return max|a| of each weight in float64, 0 for an empty weight."""
    found = [a_i.abs().max().double() if a_i.numel() else bucket.zeros(1)[0] for a_i in a]
    return torch.stack(found)


def adarem(
    bucket: VectorBucket, x: Stream, g: Stream, m: Stream, peaks: Tensor, options: AdaRemOptions
) -> Tensor:
    """Take one step of AdaRem; elements of g that are not finite count as 0.

    b = sign(g)·m/(max|m| + ε); x = round(x − lr·((1 + λᵗ·b)·g + weight_decay·x));
    m = β·m + (1 − β)·g.

    Args:
        bucket: the weights.
        x: weights, written.
        g: gradients.
        m: momenta, written.
        peaks: (weights,) float64, max|m| of each weight.
        options: the coefficients.

    Returns:
        (weights,) float64, max|m| of the new m.
    """
    o, dtype = options, bucket.compute_dtype
    # Not lam_t / tensor, which torch evaluates as lam_t times a reciprocal: two roundings.
    gain = (torch.full_like(peaks, o.lam_t) / (peaks + o.eps)).to(dtype)
    for i, (x_i, g_i, m_i) in enumerate(zip(x, g, m, strict=True)):
        finite = g_i.to(dtype)
        finite = torch.where(finite.isfinite(), finite, 0.0)
        adjusted = (1 + gain[i] * (finite.sign() * m_i)) * finite
        wide_x = x_i.to(dtype)
        m_i.copy_(o.beta * m_i + (1 - o.beta) * finite)
        x_i.copy_(wide_x + -(o.lr * (adjusted + o.weight_decay * wide_x)))
    return abs_max(bucket, m)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return a·b with float64 products."""
    return (a.double() * b.double()).sum()
