"""norm: g·g over the finite elements."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from mechanic_fused.bucket import Bucket

from .chunk_loop import chunk_loop
from .formulas import finite_or_zero, gradient_multiplier
from .layout import (
    HYPER_COLUMNS,
    SUMS_GG,
    TENSOR_COLUMNS,
    TENSOR_GRADIENT,
    TENSOR_GROUP,
    TENSOR_SCALE,
)
from .reduce import is_empty, launch, load_chunk, reduce_chunk, reduce_scale
from .storage import array, at, read, widen


class NormStreams(NamedTuple):
    """What the blocks of a chunk work on."""

    g: tl.tensor
    offset: tl.tensor  # of the chunk
    multiplier: tl.tensor  # of the gradient, in the dtype of arithmetic


@triton.jit
def norm_block(OP: tl.constexpr, T: tl.constexpr, streams, i, limit):
    """The products g·g, float64, 0 where g is not finite."""
    g_at = at(streams.g, streams.offset, i, limit)
    mask = None if limit is None else i < limit
    g = widen(read(g_at, mask), T) * streams.multiplier
    g = finite_or_zero(g).to(tl.float64)
    return (g * g,)


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
    """sums[:, GG] = Σ g·g over the finite elements of g, before any clipping.

    g is multiplied as in accumulate, in T; products and their sums are float64. Programs as there.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    if program < chunk_count:
        # Backwards, since accumulate starts at the end that is then left in the cache.
        chunk = chunk_count - 1 - program
        index, offset, length = load_chunk(chunks, chunk)
        tensor = tensors + index * TENSOR_COLUMNS
        g = tl.load(tensor + TENSOR_GRADIENT)
        row = tl.load(tensor + TENSOR_SCALE)
        h = hyper + tl.load(tensor + TENSOR_GROUP) * HYPER_COLUMNS
        multiplier = gradient_multiplier(h, grad_scale, None).to(T)
        # An absent gradient has no elements.
        length = tl.where(g == 0, 0, length)
        streams = NormStreams(array(g, X), offset, multiplier)
        totals = chunk_loop(
            norm_block, None, T, streams, length, g % 16 == 0, 1, "sum", BLOCK, TAIL
        )
        last = reduce_chunk(chunk, row, totals, partials, spans, tickets, (SUMS_GG,))
    else:
        row = (program - chunk_count).to(tl.int64)
        last = is_empty(row, spans)
    if last:
        reduce_scale(row, partials, sums, spans, tickets, (SUMS_GG,))


def norm(bucket: Bucket) -> None:
    """Take g·g over the finite elements, before any clipping."""
    launch(
        norm_kernel,
        bucket,
        hyper=bucket.handle.hyper,
        grad_scale=bucket.grad_scale,
        found_inf=bucket.found_inf,
    )
