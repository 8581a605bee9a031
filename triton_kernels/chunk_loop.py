"""The loop over the elements of a chunk, written once for every kernel that has one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def join(a, b, REDUCE: tl.constexpr):
    """a + b, or the larger one."""
    if REDUCE == "sum":
        return a + b
    else:
        return tl.maximum(a, b)


@triton.jit
def reduce_elements(x, AXIS: tl.constexpr, REDUCE: tl.constexpr):
    """The sum, or the maximum, over the elements of x along an axis."""
    if REDUCE == "sum":
        return tl.sum(x, AXIS)
    else:
        return tl.max(x, AXIS)


@triton.jit
def neighbours(x, COUNT: tl.constexpr, REDUCE: tl.constexpr):
    """The elements of x joined to COUNT, each with its neighbours: those of the same thread."""
    if x.shape[0] == COUNT:
        return x
    else:
        return reduce_elements(tl.reshape(x, (COUNT, x.shape[0] // COUNT)), 1, REDUCE)


@triton.jit
def add_block(totals, found, REDUCE: tl.constexpr):
    """The totals with the contributions of one more block, which may have more elements."""
    joined = ()
    for k in tl.static_range(len(totals)):
        own = neighbours(found[k], totals[k].shape[0], REDUCE)
        joined = joined + (join(totals[k], own, REDUCE),)
    return joined


@triton.jit
def chunk_loop(
    block: tl.constexpr,
    OP: tl.constexpr,
    T: tl.constexpr,
    streams,
    length,
    aligned,
    COUNT: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Call ``block`` for all elements of a chunk; return its COUNT totals.

    Args:
        block: called as ``block(OP, T, streams, i, limit)`` for the elements i of the chunk below
            ``limit``, or for all of them where it is None; returns a tuple of COUNT contributions.
            A block computes its mask after its pointers: the other order takes registers.
        OP, T: passed on, since a tuple cannot hold constexprs.
        length: elements of the chunk, int32.
        aligned: whether all arrays are aligned to 16 bytes. Then whole blocks of BLOCK elements are
            loaded 128 bits at a time; the rest is taken in blocks of TAIL, an element a thread.
        REDUCE: "sum", of float64 contributions, or "max", of int64 ones.
    """
    dtype: tl.constexpr = tl.float64 if REDUCE == "sum" else tl.int64
    whole = tl.where(aligned, length // BLOCK, 0)

    # More than two totals for each of a thread's elements would take too many registers.
    WIDTH: tl.constexpr = BLOCK if COUNT <= 2 else TAIL
    totals = (tl.zeros((WIDTH,), dtype=dtype),) * COUNT
    number = 0
    while number < whole:
        i = number * BLOCK + tl.arange(0, BLOCK)
        totals = add_block(totals, block(OP, T, streams, i, None), REDUCE)
        number += 1
    of_blocks = ()
    for k in tl.static_range(COUNT):
        of_blocks = of_blocks + (reduce_elements(totals[k], 0, REDUCE),)

    totals = (tl.zeros((TAIL,), dtype=dtype),) * COUNT
    start = whole * BLOCK
    while start < length:
        i = start + tl.arange(0, TAIL)
        totals = add_block(totals, block(OP, T, streams, i, length), REDUCE)
        start += TAIL
    result = ()
    for k in tl.static_range(COUNT):
        total = reduce_elements(totals[k], 0, REDUCE)
        result = result + (join(of_blocks[k], total, REDUCE),)
    return result
