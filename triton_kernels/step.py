"""step: the sums of the running form with the x before it; the base's state moves, x += S·u."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from mechanic_fused.bucket import Bucket
from mechanic_fused.log_tuner import LogTuner

from .base_update import advance_steps, base_update
from .chunk_loop import chunk_loop
from .formulas import (
    Coefficients,
    apply_update,
    coefficients,
    finite_or_zero,
    join,
    peak_ratio,
    split,
)
from .layout import (
    HYPER_COLUMNS,
    LOG_COLUMNS,
    LOG_SCALE,
    SUMS_COUNT,
    SUMS_GD,
    SUMS_GG,
    SUMS_UU,
    SUMS_XX,
    TENSOR_COLUMNS,
    TENSOR_GRADIENT,
    TENSOR_GROUP,
    TENSOR_SCALE,
    TENSOR_STATE0,
    TENSOR_STATE1,
    TENSOR_STEP,
    TENSOR_WEIGHT,
    TENSOR_X_LOW,
    TENSOR_X_REF,
)
from .reduce import is_empty, launch, load_chunk, reduce_chunk, reduce_scale
from .storage import DTYPES, array, at, read, widen


class StepStreams(NamedTuple):
    """What the blocks of a chunk work on."""

    g: tl.tensor
    x: tl.tensor
    x_low: tl.tensor  # read only beside 16-bit weights
    x_ref: tl.tensor
    state0: tl.tensor
    state1: tl.tensor
    offset: tl.tensor  # of the chunk in each of these arrays
    scale: tl.tensor  # S in the dtype of arithmetic
    c: Coefficients


@triton.jit
def step_block(KIND: tl.constexpr, T: tl.constexpr, streams, i, limit):
    """x += S·u, the state moves; returns the products g·(x − x_ref), g·g, x·x, u·u, float64.

    The products take g as it is and the x before, u takes 0 where g is not finite.
    """
    X: tl.constexpr = streams.x.dtype.element_ty
    g_at = at(streams.g, streams.offset, i, limit)
    x_at = at(streams.x, streams.offset, i, limit)
    x_low_at = at(streams.x_low, streams.offset, i, limit)
    x_ref_at = at(streams.x_ref, streams.offset, i, limit)
    state0_at = at(streams.state0, streams.offset, i, limit)
    state1_at = at(streams.state1, streams.offset, i, limit)
    mask = None if limit is None else i < limit
    g = widen(read(g_at, mask), T) * streams.c.gradient
    x = read(x_at, mask)
    if X != T:
        x = join(x, read_low(x_low_at, mask))
    displacement = x - widen(read(x_ref_at, mask), T)
    wide_g, wide_x = g.to(tl.float64), x.to(tl.float64)
    u = base_update(KIND, T, finite_or_zero(g), x, state0_at, state1_at, mask, streams.c)
    wide_u = u.to(tl.float64)
    moved = apply_update(x, streams.scale, u)
    if X != T:
        nearest, low = split(moved, X)
        tl.store(x_at, nearest, mask=mask)
        tl.store(x_low_at, low, mask=mask)
    else:
        tl.store(x_at, moved, mask=mask)
    gd = wide_g * displacement.to(tl.float64)
    return gd, wide_g * wide_g, wide_x * wide_x, wide_u * wide_u


@triton.jit
def read_low(pointers, mask):
    """Load integers; 0 where the mask is false."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit(do_not_specialize=["chunk_count"])
def step_kernel(
    tensors,
    chunks,
    hyper,
    spans,
    tickets,
    partials,
    sums,
    tuner,
    grad_scale,
    found_inf,
    clip,
    chunk_count,
    KIND: tl.constexpr,
    X: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The columns gd, gg, xx, uu and count of the sums; then x += S·u, state = state'.

    One program a chunk, then one a scale, which does something only for a scale without chunks.
    Arithmetic is in T with one rounding an operation, products and their sums in float64; 16-bit x
    are stored with low bits beside them, the state in S. ``tuner`` is the log tuner's state, a row
    a scale. Where ``found_inf`` is not 0, or a gradient is absent, nothing changes.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    COLUMNS: tl.constexpr = (SUMS_GD, SUMS_GG, SUMS_XX, SUMS_UU, SUMS_COUNT)
    program = tl.program_id(0)
    if program < chunk_count:
        index, offset, length = load_chunk(chunks, program)
        tensor = tensors + index * TENSOR_COLUMNS
        g = tl.load(tensor + TENSOR_GRADIENT)
        x = tl.load(tensor + TENSOR_WEIGHT)
        x_low = tl.load(tensor + TENSOR_X_LOW)
        x_ref = tl.load(tensor + TENSOR_X_REF)
        state0 = tl.load(tensor + TENSOR_STATE0)
        state1 = tl.load(tensor + TENSOR_STATE1)
        step_at = array(tl.load(tensor + TENSOR_STEP), tl.float32)
        row = tl.load(tensor + TENSOR_SCALE)
        h = hyper + tl.load(tensor + TENSOR_GROUP) * HYPER_COLUMNS
        step = tl.load(step_at, mask=(KIND == "adam") | (KIND == "momentum"), other=0.0)
        c = coefficients(h, grad_scale, clip, step, KIND, T)
        # An absent gradient has no elements.
        length = tl.where(g == 0, 0, length)
        aligned = (g | x | x_low | x_ref | state0 | state1) % 16 == 0
        streams = StepStreams(
            array(g, X),
            array(x, X),
            array(x_low, tl.int16),
            array(x_ref, X),
            array(state0, S),
            array(state1, S),
            offset,
            tl.load(tuner + row * LOG_COLUMNS + LOG_SCALE).to(T),
            c,
        )
        totals = chunk_loop(step_block, KIND, T, streams, length, aligned, 4, "sum", BLOCK, TAIL)
        to_peak = peak_ratio(h)
        uu = totals[3] * (to_peak * to_peak)
        totals = (totals[0], totals[1], totals[2], uu, length.to(tl.float64))
        last = reduce_chunk(program, row, totals, partials, spans, tickets, COLUMNS)
    else:
        row = (program - chunk_count).to(tl.int64)
        last = is_empty(row, spans)
    if last:
        reduce_scale(row, partials, sums, spans, tickets, COLUMNS)
        # Only now, when no program reads the counts any more.
        if KIND == "adam" or KIND == "momentum":
            advance_steps(row, tensors, spans)


def step(bucket: Bucket, tuner: LogTuner) -> None:
    """Take the sums with the x before the step, move the base's state, and x += S·u."""
    state = bucket.states[0][0].dtype if bucket.states[0] else bucket.compute_dtype
    launch(
        step_kernel,
        bucket,
        hyper=bucket.handle.hyper,
        tuner=tuner.state,
        grad_scale=bucket.grad_scale,
        found_inf=bucket.found_inf,
        clip=bucket.clip,
        KIND=bucket.kind,
        S=DTYPES[state],
    )
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.with_gradient)
