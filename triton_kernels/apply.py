"""apply: x = round(x_ref + S·Δ), and what the next step needs of it; measure: that alone."""

from __future__ import annotations

import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from mechanic_fused.bucket import Bucket
from mechanic_fused.tuner import Tuner

from .storage import (
    CHUNK_COLUMNS,
    DELTA,
    DTYPES,
    SCALE,
    TENSOR_COLUMNS,
    WEIGHT,
    X_REF,
    aligned_at,
    at,
    narrow,
    read,
    widen,
)
from .sums import fold, launch, reduce_chunk


@triton.jit
def total(s, BETAS: tl.constexpr):
    """S = Σ s, float64, in the order of the betas."""
    sum = tl.load(s)
    for i in tl.static_range(1, BETAS):
        sum = sum + tl.load(s + i)
    return sum


@triton.jit
def blend(x_ref, scale, delta):
    """x_ref + S·Δ."""
    return x_ref + scale * delta


@triton.jit
def settle(x_at, x_ref_at, delta_at, mask, scale, WRITES: tl.constexpr, T: tl.constexpr):
    """One block: x = round(x_ref + S·Δ) where WRITES; returns the products x·Δ and x·x, float64."""
    delta = widen(read(delta_at, mask), T)
    if WRITES:
        x = narrow(blend(widen(read(x_ref_at, mask), T), scale, delta), x_at.dtype.element_ty)
        tl.store(x_at, x, mask=mask)
    else:
        x = read(x_at, mask)
    wide_x = widen(x, T).to(tl.float64)
    return wide_x * delta.to(tl.float64), wide_x * wide_x


@triton.jit(do_not_specialize=["chunk_count"])
def apply_kernel(
    tensors,
    chunks,
    spans,
    tickets,
    partials,
    sums,
    tuner,
    found_inf,
    chunk_count,
    BETAS: tl.constexpr,
    X: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """x = round(x_ref + S·Δ); then sums[:, 1] = Σ x·Δ and sums[:, 3] = Σ x·x of the rounded x.

    S, a float64 sum, is rounded to T, as are S·Δ and the sum; Δ lies in D; x is rounded to X, to
    even; products and their sums are float64. ``tuner`` is its state, a row a scale, or None: then
    x is not written and the sums are of x as it stands, in the same order, so that bits agree.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    if program < chunk_count:
        # Backwards, since the end of Δ is what accumulate has left in the cache.
        chunk = chunk_count - 1 - program
        tensor = tensors + tl.load(chunks + chunk * CHUNK_COLUMNS) * TENSOR_COLUMNS
        offset = tl.load(chunks + chunk * CHUNK_COLUMNS + 1)
        length = tl.load(chunks + chunk * CHUNK_COLUMNS + 2).to(tl.int32)
        x = tl.load(tensor + WEIGHT)
        x_ref = tl.load(tensor + X_REF)
        delta = tl.load(tensor + DELTA)
        row = tl.load(tensor + SCALE)
        WRITES: tl.constexpr = tuner is not None
        scale = None
        if WRITES:
            scale = total(tuner + row * (4 * BETAS + 2), BETAS).to(T)

        # Whole blocks at aligned addresses go 128 bits wide, the rest an element at a time.
        aligned = (x | x_ref | delta) % 16 == 0
        whole = tl.where(aligned, length // BLOCK, 0)

        xd = tl.zeros((BLOCK,), dtype=tl.float64)
        xx = tl.zeros((BLOCK,), dtype=tl.float64)
        number = 0
        while number < whole:
            i = number * BLOCK + tl.arange(0, BLOCK)
            more_xd, more_xx = settle(
                aligned_at(x, offset, X) + i,
                aligned_at(x_ref, offset, X) + i,
                aligned_at(delta, offset, D) + i,
                None,
                scale,
                WRITES,
                T,
            )
            xd += more_xd
            xx += more_xx
            number += 1
        total_xd = tl.sum(xd, 0)
        total_xx = tl.sum(xx, 0)

        xd = tl.zeros((TAIL,), dtype=tl.float64)
        xx = tl.zeros((TAIL,), dtype=tl.float64)
        start = whole * BLOCK
        while start < length:
            i = start + tl.arange(0, TAIL)
            more_xd, more_xx = settle(
                at(x, offset, X) + i,
                at(x_ref, offset, X) + i,
                at(delta, offset, D) + i,
                i < length,
                scale,
                WRITES,
                T,
            )
            xd += more_xd
            xx += more_xx
            start += TAIL
        total_xd += tl.sum(xd, 0)
        total_xx += tl.sum(xx, 0)
        last = reduce_chunk(chunk, row, total_xd, total_xx, partials, spans, tickets, 1)
    else:
        row = (program - chunk_count).to(tl.int64)
        last = tl.load(spans + row * 4 + 1) == 0
    if last:
        fold(row, partials, sums, spans, tickets, 1)


def apply(bucket: Bucket, tuner: Tuner) -> None:
    """x = round(x_ref + S·Δ); leaves x·Δ and x·x of the rounded x for the next step."""
    launch(
        apply_kernel,
        bucket,
        tuner=tuner.state,
        found_inf=bucket.found_inf,
        BETAS=len(tuner.betas),
        D=DTYPES[bucket.delta[0].dtype],
    )
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.parameters)


def measure(bucket: Bucket) -> None:
    """Take x·Δ and x·x from x as it stands."""
    dtype = DTYPES[bucket.delta[0].dtype]
    launch(apply_kernel, bucket, tuner=None, found_inf=None, BETAS=0, D=dtype)
