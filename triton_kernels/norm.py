"""norm: g·g over the elements that are finite."""

from __future__ import annotations

import triton
import triton.language as tl

from mechanic_fused.bucket import Bucket

from .formulas import multiplier
from .storage import (
    CHUNK_COLUMNS,
    GRADIENT,
    GROUP,
    SCALE,
    TENSOR_COLUMNS,
    aligned_at,
    at,
    read,
    widen,
)
from .sums import fold, launch, reduce_chunk


@triton.jit
def square(g_at, mask, by, T: tl.constexpr):
    """One block's g·g, float64, 0 where g is not finite."""
    g = widen(read(g_at, mask), T) * by
    g = tl.where(g - g == 0, g, 0.0).to(tl.float64)
    return g * g


@triton.jit(do_not_specialize=["chunk_count"])
def norm_kernel(
    tensors,
    chunks,
    hyper,
    spans,
    tickets,
    partials,
    sums,
    grad_scale,
    found_inf,
    chunk_count,
    X: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """sums[:, 2] = Σ g·g over the finite elements of g, before any clipping.

    g is multiplied as in accumulate, in T; products and their sums are float64. Programs as there.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    if program < chunk_count:
        # Backwards, since accumulate starts at the end that is then left in the cache.
        chunk = chunk_count - 1 - program
        tensor = tensors + tl.load(chunks + chunk * CHUNK_COLUMNS) * TENSOR_COLUMNS
        offset = tl.load(chunks + chunk * CHUNK_COLUMNS + 1)
        length = tl.load(chunks + chunk * CHUNK_COLUMNS + 2).to(tl.int32)
        g = tl.load(tensor + GRADIENT)
        row = tl.load(tensor + SCALE)
        by = multiplier(hyper + tl.load(tensor + GROUP) * 8, grad_scale, None).to(T)

        # An absent gradient has no elements.
        length = tl.where(g == 0, 0, length)
        # Whole blocks at aligned addresses go 128 bits wide, the rest an element at a time.
        whole = tl.where(g % 16 == 0, length // BLOCK, 0)

        gg = tl.zeros((BLOCK,), dtype=tl.float64)
        number = 0
        while number < whole:
            i = number * BLOCK + tl.arange(0, BLOCK)
            gg += square(aligned_at(g, offset, X) + i, None, by, T)
            number += 1
        total = tl.sum(gg, 0)

        gg = tl.zeros((TAIL,), dtype=tl.float64)
        start = whole * BLOCK
        while start < length:
            i = start + tl.arange(0, TAIL)
            gg += square(at(g, offset, X) + i, i < length, by, T)
            start += TAIL
        total += tl.sum(gg, 0)
        last = reduce_chunk(chunk, row, total, None, partials, spans, tickets, 2)
    else:
        row = (program - chunk_count).to(tl.int64)
        last = tl.load(spans + row * 4 + 1) == 0
    if last:
        fold(row, partials, sums, spans, tickets, 2)


def norm(bucket: Bucket) -> None:
    """Take g·g over the elements that are finite, before any clipping."""
    launch(
        norm_kernel,
        bucket,
        hyper=bucket.handle.hyper,
        grad_scale=bucket.grad_scale,
        found_inf=bucket.found_inf,
    )
