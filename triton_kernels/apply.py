"""apply: x = round(x_ref + S·Δ), and the sums that the next step needs; measure: the sums alone."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from mechanic_fused.bucket import Bucket
from mechanic_fused.tuner import Tuner

from .chunk_loop import chunk_loop
from .formulas import apply_scale, total_scale
from .layout import (
    COUNTERS_COLUMNS,
    SUMS_XD,
    SUMS_XX,
    TENSOR_COLUMNS,
    TENSOR_DELTA,
    TENSOR_DELTA_SCALES,
    TENSOR_SCALE,
    TENSOR_WEIGHT,
    TENSOR_X_REF,
    TUNER_BLOCKS,
)
from .quantize import LINEAR_TOP
from .reduce import is_empty, launch, load_chunk, reduce_chunk, reduce_scale
from .states import load_codes
from .storage import STORED_DTYPES, array, at, narrow, read, widen


class ApplyStreams(NamedTuple):
    """What the blocks of a chunk work on."""

    x: tl.tensor
    x_ref: tl.tensor
    delta: tl.tensor
    delta_scales: tl.tensor  # of codes
    offset: tl.tensor  # of the chunk in each of these arrays
    scale: tl.tensor  # S in the dtype of arithmetic, or None where x is not written


@triton.jit
def apply_block(OP: tl.constexpr, T: tl.constexpr, streams, i, limit):
    """x = round(x_ref + S·Δ) if OP says so; returns the products x·Δ and x·x, float64.

    OP is whether x is written, and how many elements share a scale of Δ's codes, 0 without codes.
    """
    x_at = at(streams.x, streams.offset, i, limit)
    x_ref_at = at(streams.x_ref, streams.offset, i, limit)
    mask = None if limit is None else i < limit
    if OP[1] == 0:
        delta = widen(read(at(streams.delta, streams.offset, i, limit), mask), T)
    else:
        scales = streams.delta_scales
        delta = load_codes(streams.delta, scales, streams.offset, i, limit, OP[1], LINEAR_TOP)
    if OP[0]:
        x_ref = widen(read(x_ref_at, mask), T)
        x = narrow(apply_scale(x_ref, streams.scale, delta), x_at.dtype.element_ty)
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
    DELTA_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """x = round(x_ref + S·Δ); then sums[:, XD] = Σ x·Δ and sums[:, XX] = Σ x·x of the rounded x.

    S, a float64 sum, is rounded to T, as are S·Δ and x_ref + S·Δ; Δ is stored in D; int16 means
    codes, of which DELTA_BLOCK share a scale; x is rounded to X, ties to even; products and their
    sums are float64. ``tuner`` is its state, a row a scale, or None: then x is not written and the
    sums are of x as it is, in the same order, so that their bits agree.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    if program < chunk_count:
        # Backwards, since accumulate has left the end of Δ in the cache.
        chunk = chunk_count - 1 - program
        index, offset, length = load_chunk(chunks, chunk)
        tensor = tensors + index * TENSOR_COLUMNS
        x = tl.load(tensor + TENSOR_WEIGHT)
        x_ref = tl.load(tensor + TENSOR_X_REF)
        delta = tl.load(tensor + TENSOR_DELTA)
        row = tl.load(tensor + TENSOR_SCALE)
        WRITES: tl.constexpr = tuner is not None
        scale = None
        if WRITES:
            s_at = tuner + row * (TUNER_BLOCKS * BETAS + COUNTERS_COLUMNS)
            scale = total_scale(s_at, None, BETAS).to(T)
        aligned = (x | x_ref | delta) % 16 == 0
        scales = array(tl.load(tensor + TENSOR_DELTA_SCALES), tl.float32)
        streams = ApplyStreams(array(x, X), array(x_ref, X), array(delta, D), scales, offset, scale)
        OP: tl.constexpr = (WRITES, DELTA_BLOCK)
        totals = chunk_loop(apply_block, OP, T, streams, length, aligned, 2, "sum", BLOCK, TAIL)
        last = reduce_chunk(chunk, row, totals, partials, spans, tickets, (SUMS_XD, SUMS_XX))
    else:
        row = (program - chunk_count).to(tl.int64)
        last = is_empty(row, spans)
    if last:
        reduce_scale(row, partials, sums, spans, tickets, (SUMS_XD, SUMS_XX))


def apply(bucket: Bucket, tuner: Tuner) -> None:
    """x = round(x_ref + S·Δ); leaves x·Δ and x·x of the rounded x for the next step."""
    launch(
        apply_kernel,
        bucket,
        tuner=tuner.state,
        found_inf=bucket.found_inf,
        BETAS=len(tuner.betas),
        **format_of_delta(bucket),
    )
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.parameters)


def measure(bucket: Bucket) -> None:
    """Take x·Δ and x·x of the weights as they are."""
    launch(apply_kernel, bucket, tuner=None, found_inf=None, BETAS=0, **format_of_delta(bucket))


def format_of_delta(bucket: Bucket) -> dict[str, object]:
    """Return the arguments that say how Δ is stored."""
    block = bucket.state_block if bucket.delta_scales else 0
    return {"D": STORED_DTYPES[bucket.delta[0].dtype], "DELTA_BLOCK": block}
