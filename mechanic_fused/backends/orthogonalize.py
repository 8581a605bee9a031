"""Matrices with singular values near 1, many of one shape at a time: what Muon makes of a momentum.

NewtonSchulz(n) brings the singular values of n near 1: X₀ = n/‖n‖, and X ← a·X + (b·A + c·A²)·X
with A = X·Xᵀ, some steps with coefficients (a, b, c) each. Of tall matrices X ← X·(…), A = Xᵀ·X.

Source: kellerjordan.github.io/posts/muon; arXiv 2502.16982 for the ratio "match_rms_adamw".
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import compute_dtype

Group = dict[str, Any]

QUINTIC = (3.4445, -4.7750, 2.0315)
"""torch's default coefficients, the same in each step."""

POLAR_EXPRESS = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)
"""The coefficients of each step; further steps take the last. Source: arXiv 2505.16932."""

POLAR_MARGIN = 1.02
"""By which Polar Express divides in addition, so that no singular value is above 1."""

LONG = 2
"""From matrices more than this many times as long as wide on, steps are taken together."""

TOGETHER = 2
"""Newton–Schulz steps whose polynomials are multiplied with each other before X, for long matrices:
their Gram matrices are smaller than X. Three together round worse than three single steps."""

SCRATCH = 4
"""Gram matrices and products of them that are held at once."""

SYMMETRIC = "mechanic_fused.triton_kernels.symmetric"
"""The module of the kernel that multiplies half of a symmetric product."""

SYMMETRIC_FROM = 2048
"""Rows from which on it is tried: on smaller ones cuBLAS is faster, as others have measured."""

LEAST_GAIN = 0.95
"""The time in units of torch's that it must stay below, so that noise does not choose."""

RATIOS = ("original", "match_rms_adamw")


def newton_schulz(
    matrices: Tensor, coefficients: Sequence[float] | str, steps: int, eps: float
) -> Tensor:
    """Return matrices whose singular values are near 1, with the singular vectors of these.

    Args:
        matrices: (batch, rows, columns), in the dtype of the arithmetic; overwritten.
        coefficients: (a, b, c) of every step, or "polar_express".
        steps: how many.
        eps: the least norm that is divided by.
    """
    polar = isinstance(coefficients, str)
    of_steps = POLAR_EXPRESS if isinstance(coefficients, str) else (coefficients,)
    chosen = [of_steps[min(step, len(of_steps) - 1)] for step in range(steps)]
    x = matrices.contiguous()
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x.div_(norms.mul_(POLAR_MARGIN if polar else 1.0).clamp_(min=eps))
    is_tall = x.shape[1] > x.shape[2]
    smaller, larger = sorted(x.shape[1:])
    at_once = TOGETHER if larger > LONG * smaller else 1
    result, scratch = torch.empty_like(x), x.new_empty(SCRATCH, x.shape[0], smaller, smaller)
    for first in range(0, steps, at_once):
        gram = symmetric_product(x.mT if is_tall else x, scratch[0])
        polynomial = gram_polynomial(gram, chosen[first : first + at_once], scratch[1:])
        torch.bmm(*((x, polynomial) if is_tall else (polynomial, x)), out=result)
        x, result = result, x
    return x


def gram_polynomial(
    gram: Tensor, coefficients: Sequence[Sequence[float]], scratch: Tensor
) -> Tensor:
    """Return Z_k·…·Z_1 of steps with these coefficients: what they multiply X by.

    Z = a·I + b·A + c·A², and A ← Z·A·Z.

    Args:
        gram: A = X·Xᵀ, (batch, n, n); overwritten.
        coefficients: (a, b, c) of each step.
        scratch: (SCRATCH − 1, batch, n, n), overwritten; the result is in it.
    """
    z, total, other = scratch
    for i, (a, b, c) in enumerate(coefficients):
        own = z if i else total
        symmetric_product(gram, own, c, b)
        # Not a·X beside the product with X, which would copy X first.
        own.diagonal(dim1=1, dim2=2).add_(a)
        if i + 1 < len(coefficients):
            torch.bmm(torch.bmm(own, gram, out=other), own, out=gram)
        if i:
            torch.bmm(z, total, out=other)
            total, other = other, total
    return total


def symmetric_product(a: Tensor, out: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """out = alpha·A·Aᵀ + beta·A, where A is symmetric if beta is not 0; return out."""
    n, k = a.shape[1:]
    if a.device.type == "cuda" and n >= SYMMETRIC_FROM and mirrors_faster(a.device, n, k, a.dtype):
        kernel: Tensor = importlib.import_module(SYMMETRIC).symmetric_product(a, out, alpha, beta)
        return kernel
    if beta:
        return torch.baddbmm(a, a, a, beta=beta, alpha=alpha, out=out)
    return torch.bmm(a, a.mT, out=out)


@functools.cache
def mirrors_faster(device: torch.device, n: int, k: int, dtype: torch.dtype) -> bool:
    """Return whether Triton's kernel, which multiplies half and mirrors it, is faster here.

    Measured once a process for each device and shape, on one matrix. False also where the kernel
    does not run, or where its result differs from torch's.
    """
    rng = torch.Generator(device=device).manual_seed(0)
    a = torch.randn(1, n, k, generator=rng, device=device).to(dtype)
    expected, found = (a.new_empty(1, n, n) for _ in range(2))
    try:
        mirrored = importlib.import_module(SYMMETRIC).symmetric_product
        mirrored(a, found)
        torch.bmm(a, a.mT, out=expected)
        # Both round sums of float32 once: to 2⁻⁸ of the result in bfloat16.
        if not torch.allclose(found.float(), expected.float(), rtol=2.0**-7, atol=k**0.5 * 2.0**-7):
            return False
        theirs = seconds_of(lambda: torch.bmm(a, a.mT, out=expected))
        return seconds_of(lambda: mirrored(a, found)) < LEAST_GAIN * theirs
    except Exception:  # of a compiler, whatever it is: torch's product is always there
        return False


def seconds_of(call: Callable[[], object], rounds: int = 5) -> float:
    """Return the least time of a call on the current GPU."""
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return min(found)


def adjusted_ratio(name: str | None, rows: int, columns: int) -> float:
    """Return what O is multiplied by: a function of the matrix' shape.

    Args:
        name: "original" (None): √max(1, rows/columns); "match_rms_adamw": 0.2·√max(rows, columns),
            by which updates are about as large as AdamW's.
    """
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (matrices, rows, columns) of a weight.

    One of two dimensions is a matrix; the first of three counts matrices (experts); of more, as in
    convolutions, all but the first are one.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def product_dtype(device: torch.device, compute: torch.dtype, group: Group) -> torch.dtype:
    """Return the dtype of the products: that of the group, or bfloat16 where it is the faster one.

    It is on GPUs, and on CPUs that have instructions for it. Beside float64 weights it is float64.
    """
    if compute is torch.float64:
        return compute
    fast = device.type != "cpu" or multiplies_bfloat16()
    return group.get("ns_dtype") or (torch.bfloat16 if fast else torch.float32)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions that multiply matrices in bfloat16."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16"))


def orthogonalized(n: Tensor, group: Group) -> tuple[Tensor, float]:
    """Return O of weights of one shape, each of whose parts is a matrix of its own, and the ratio.

    Args:
        n: (weights, …) in the dtype of the products; overwritten.
        group: has ns_coefficients, ns_steps, eps, adjust_lr_fn and perhaps split_sizes: the rows of
            each part, of fused projections. O of parts is multiplied by their own ratios.

    Returns:
        O in n's shape, and the ratio by which it is still to be multiplied.
    """
    if not n.numel():
        return n.to(compute_dtype(n.dtype)) if group.get("split_sizes") else n, 1.0
    options = (group["ns_coefficients"], group["ns_steps"], group["eps"])
    _, rows, columns = matrix_shape(n.shape[1:])
    whole, name = n.reshape(-1, rows, columns), group["adjust_lr_fn"]
    if not group.get("split_sizes"):
        made = newton_schulz(whole, *options)
        return made.reshape(n.shape), adjusted_ratio(name, rows, columns)
    parts = []
    for part in whole.split(list(group["split_sizes"]), dim=1):
        # A copy, since NewtonSchulz writes to what it is given.
        made = newton_schulz(part.contiguous(), *options).to(compute_dtype(n.dtype))
        parts.append(made * adjusted_ratio(name, *part.shape[1:]))
    return torch.cat(parts, dim=1).reshape(n.shape), 1.0
