"""A·Aᵀ of matrices: half of the products of tiles, and the other half mirrored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .storage import narrow, on

TILE, DEPTH = 128, 64
"""Rows and columns of a tile of the result, and columns of A that are multiplied at a time."""

OPTIONS = {"num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["alpha", "beta"])
def symmetric_kernel(
    a,
    out,
    n,
    alpha,
    beta,
    a_batch,
    a_row,
    a_column,
    out_batch,
    out_row,
    K: tl.constexpr,
    ADDS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = alpha·A·Aᵀ + beta·A, a program a tile and matrix; those above the diagonal do nothing.

    A is (batch, n, K) with these strides, out (batch, n, n). ADDS: whether beta is not 0; then A is
    symmetric itself.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    if j > i:
        return
    number = tl.program_id(2).to(tl.int64)
    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    base = a + number * a_batch
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for first in range(0, K, DEPTH):
        inner = first + tl.arange(0, DEPTH)
        of_rows = base + rows[:, None] * a_row + inner[None, :] * a_column
        left = tl.load(of_rows, mask=(rows[:, None] < n) & (inner[None, :] < K), other=0.0)
        of_columns = base + columns[None, :] * a_row + inner[:, None] * a_column
        mask = (columns[None, :] < n) & (inner[:, None] < K)
        right = tl.load(of_columns, mask=mask, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    total = alpha * total
    if ADDS:
        own = base + rows[:, None] * a_row + columns[None, :] * a_column
        total += beta * tl.load(own, mask=inside, other=0.0).to(tl.float32)
    result = narrow(total, out.dtype.element_ty)
    to = out + number * out_batch
    tl.store(to + rows[:, None] * out_row + columns[None, :], result, mask=inside)
    if i != j:
        mirrored = to + columns[:, None] * out_row + rows[None, :]
        tl.store(mirrored, tl.trans(result), mask=tl.trans(inside))


def symmetric_product(
    a: torch.Tensor, out: torch.Tensor, alpha: float = 1.0, beta: float = 0.0
) -> torch.Tensor:
    """out = alpha·A·Aᵀ + beta·A, with float32 sums; returns out.

    Args:
        a: (batch, n, k), bfloat16 or float32; symmetric if beta is not 0.
        out: (batch, n, n) of the same dtype, contiguous; not a.
    """
    batch, n, k = a.shape
    tiles = triton.cdiv(n, TILE)
    with on(a.device):
        symmetric_kernel[(tiles, tiles, batch)](
            a,
            out,
            n,
            alpha,
            beta,
            *a.stride(),
            *out.stride()[:2],
            K=k,
            ADDS=beta != 0,
            TILE=TILE,
            DEPTH=DEPTH,
            **OPTIONS,
        )
    return out
