"""The two ends of a step of Muon around products of matrices: the sums and n; x += S·u of O."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from mechanic_fused.bucket import Bucket
from mechanic_fused.log_tuner import LogTuner

from . import formulas
from .chunk_loop import chunk_loop
from .formulas import Coefficients, apply_update, coefficients, finite_or_zero, peak_ratio
from .layout import (
    HYPER_COLUMNS,
    LOG_COLUMNS,
    LOG_SCALE,
    REFERENCE_EVERY,
    SUMS_COUNT,
    SUMS_GD,
    SUMS_GG,
    SUMS_UU,
    SUMS_XX,
    TENSOR_COLUMNS,
    TENSOR_GRADIENT,
    TENSOR_GROUP,
    TENSOR_PHASE,
    TENSOR_SCALE,
    TENSOR_STATE0,
    TENSOR_WEIGHT,
    TENSOR_X_LOW,
    TENSOR_X_REF,
)
from .quantize import SIGNED_TOP
from .reduce import is_empty, launch, load_chunk, reduce_chunk, reduce_scale
from .states import States, load_state, states_of, store_state
from .step import KeptBlocks, kept_at, kept_blocks, load_weight, store_weight
from .storage import DTYPES, STORED_DTYPES, array, at, narrow, read, widen


class MomentumStreams(NamedTuple):
    """What the blocks of a chunk work on."""

    g: tl.tensor
    x: tl.tensor
    x_low: tl.tensor  # read only beside 16-bit weights
    x_ref: tl.tensor
    n: tl.tensor
    states: States
    offset: tl.tensor  # of the chunk in each of these arrays
    kept: KeptBlocks  # or None where every weight has all of x_ref
    c: Coefficients


@triton.jit
def momentum_block(OP: tl.constexpr, T: tl.constexpr, streams, i, limit):
    """The momentum moves, n; returns the products g·(x − x_ref), g·g, x·x, float64.

    OP is how many elements share a scale of the momentum's codes, and whether x has low bits.
    """
    BLOCK: tl.constexpr = OP[0]
    HAS_LOW: tl.constexpr = OP[1]
    g_at = at(streams.g, streams.offset, i, limit)
    x_at = at(streams.x, streams.offset, i, limit)
    x_low_at = at(streams.x_low, streams.offset, i, limit)
    n_at = at(streams.n, streams.offset, i, limit)
    if streams.kept is None:
        x_ref_at = at(streams.x_ref, streams.offset, i, limit)
    else:
        x_ref_at, has_x_ref = kept_at(streams.x_ref, streams.kept, i, limit)
    mask = None if limit is None else i < limit
    g = widen(read(g_at, mask), T) * streams.c.gradient
    x = load_weight(x_at, x_low_at, mask, T, HAS_LOW)
    counted = g
    if streams.kept is None:
        x_ref = read(x_ref_at, mask)
    else:
        x_ref = read(x_ref_at, has_x_ref)
        counted = tl.where(has_x_ref, g, 0.0)
    displacement = x - widen(x_ref, T)
    # Their registers are free when those of codes are needed.
    wide_g, wide_x = g.to(tl.float64), x.to(tl.float64)
    gd = counted.to(tl.float64) * displacement.to(tl.float64)
    buffer = load_state(streams.states, i, limit, T, BLOCK, SIGNED_TOP)
    n, buffer = formulas.muon_momentum(finite_or_zero(g), buffer, streams.c)
    store_state(buffer, streams.states, i, limit, BLOCK, SIGNED_TOP)
    tl.store(n_at, narrow(n, streams.n.dtype.element_ty), mask=mask)
    return gd, wide_g * wide_g, wide_x * wide_x


@triton.jit(do_not_specialize=["chunk_count", "first", "size"])
def momentum_kernel(
    tensors,
    chunks,
    hyper,
    spans,
    tickets,
    partials,
    sums,
    first,
    size,
    grad_scale,
    found_inf,
    clip,
    step_count,
    chunk_count,
    X: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    HAS_LOW: tl.constexpr,
    IN_PART: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The columns gd, gg, xx and count of the sums; the momentum moves, and n in N is left.

    n is at the address ``first``, ``size`` elements for each weight. See ``step_kernel``.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    COLUMNS: tl.constexpr = (SUMS_GD, SUMS_GG, SUMS_XX, SUMS_COUNT)
    program = tl.program_id(0)
    if program < chunk_count:
        index, offset, length = load_chunk(chunks, program)
        tensor = tensors + index * TENSOR_COLUMNS
        g = tl.load(tensor + TENSOR_GRADIENT)
        x = tl.load(tensor + TENSOR_WEIGHT)
        x_low = tl.load(tensor + TENSOR_X_LOW)
        x_ref = tl.load(tensor + TENSOR_X_REF)
        state0 = tl.load(tensor + TENSOR_STATE0)
        n = first + index * size * (N.primitive_bitwidth // 8)
        row = tl.load(tensor + TENSOR_SCALE)
        h = hyper + tl.load(tensor + TENSOR_GROUP) * HYPER_COLUMNS
        c = coefficients(h, grad_scale, clip, 0.0, "sgd", T)
        # An absent gradient has no elements.
        length = tl.where(g == 0, 0, length)
        aligned = (g | x | x_low | x_ref | state0 | n) % 16 == 0
        kept = None
        share = 1.0
        if IN_PART:
            kept = kept_blocks(tl.load(tensor + TENSOR_PHASE), offset)
            share = tl.where(kept.dropped == 0, 1.0, REFERENCE_EVERY)
            # Packets must not reach across the ends of kept blocks.
            aligned &= kept.phase % (128 // X.primitive_bitwidth) == 0
        streams = MomentumStreams(
            array(g, X),
            array(x, X),
            array(x_low, tl.int16),
            array(x_ref, X),
            array(n, N),
            states_of(tensor, offset, step_count, S),
            offset,
            kept,
            c,
        )
        OP: tl.constexpr = (STATE_BLOCK, HAS_LOW)
        totals = chunk_loop(momentum_block, OP, T, streams, length, aligned, 3, "sum", BLOCK, TAIL)
        totals = (totals[0] * share, totals[1], totals[2], length.to(tl.float64))
        last = reduce_chunk(program, row, totals, partials, spans, tickets, COLUMNS)
    else:
        row = (program - chunk_count).to(tl.int64)
        last = is_empty(row, spans)
    if last:
        reduce_scale(row, partials, sums, spans, tickets, COLUMNS)


class UpdateStreams(NamedTuple):
    """What the blocks of a chunk work on."""

    o: tl.tensor
    x: tl.tensor
    x_low: tl.tensor  # read only beside 16-bit weights
    states: States  # tells how x is rounded
    offset: tl.tensor  # of the chunk in each of these arrays
    ratio: tl.tensor  # in the dtype of arithmetic, as S
    scale: tl.tensor
    c: Coefficients


@triton.jit
def update_block(OP: tl.constexpr, T: tl.constexpr, streams, i, limit):
    """x += S·u of O; returns the products u·u, float64. OP is whether x has low bits."""
    o_at = at(streams.o, streams.offset, i, limit)
    x_at = at(streams.x, streams.offset, i, limit)
    x_low_at = at(streams.x_low, streams.offset, i, limit)
    mask = None if limit is None else i < limit
    x = load_weight(x_at, x_low_at, mask, T, OP)
    u = formulas.muon_update(widen(read(o_at, mask), T) * streams.ratio, x, streams.c)
    moved = apply_update(x, streams.scale, u)
    store_weight(moved, x_at, x_low_at, streams.states, i, mask, OP)
    wide = u.to(tl.float64)
    return (wide * wide,)


@triton.jit(do_not_specialize=["chunk_count", "first", "size", "ratio"])
def update_kernel(
    tensors,
    chunks,
    hyper,
    spans,
    tickets,
    partials,
    sums,
    first,
    size,
    ratio,
    tuner,
    found_inf,
    step_count,
    chunk_count,
    X: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The column uu of the sums, and x += S·u of O, which is in N where n was."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    COLUMNS: tl.constexpr = (SUMS_UU,)
    program = tl.program_id(0)
    if program < chunk_count:
        index, offset, length = load_chunk(chunks, program)
        tensor = tensors + index * TENSOR_COLUMNS
        g = tl.load(tensor + TENSOR_GRADIENT)
        x = tl.load(tensor + TENSOR_WEIGHT)
        x_low = tl.load(tensor + TENSOR_X_LOW)
        o = first + index * size * (N.primitive_bitwidth // 8)
        row = tl.load(tensor + TENSOR_SCALE)
        h = hyper + tl.load(tensor + TENSOR_GROUP) * HYPER_COLUMNS
        c = coefficients(h, None, None, 0.0, "sgd", T)
        # An absent gradient has no elements.
        length = tl.where(g == 0, 0, length)
        aligned = (x | x_low | o) % 16 == 0
        streams = UpdateStreams(
            array(o, N),
            array(x, X),
            array(x_low, tl.int16),
            states_of(tensor, offset, step_count, T),
            offset,
            tl.full((), ratio, T),
            tl.load(tuner + row * LOG_COLUMNS + LOG_SCALE).to(T),
            c,
        )
        totals = chunk_loop(
            update_block, HAS_LOW, T, streams, length, aligned, 1, "sum", BLOCK, TAIL
        )
        to_peak = peak_ratio(h)
        totals = (totals[0] * (to_peak * to_peak),)
        last = reduce_chunk(program, row, totals, partials, spans, tickets, COLUMNS)
    else:
        row = (program - chunk_count).to(tl.int64)
        last = is_empty(row, spans)
    if last:
        reduce_scale(row, partials, sums, spans, tickets, COLUMNS)


def muon_momentum(bucket: Bucket, n: Tensor) -> None:
    """Take the sums with the x before the step, move the momentum, and leave n."""
    launch(
        momentum_kernel,
        bucket,
        grad_scale=bucket.grad_scale,
        clip=bucket.clip,
        S=STORED_DTYPES[bucket.states[0][0].dtype],
        STATE_BLOCK=bucket.state_block,
        IN_PART=bucket.in_part > 0,
        **_common(bucket, n),
    )


def muon_update(bucket: Bucket, o: Tensor, ratio: float, tuner: LogTuner) -> None:
    """x += S·u of O, and the sum of u·u."""
    if o.dtype is torch.float64:  # Triton passes a float in float32
        o, ratio = o * ratio, 1.0
    launch(update_kernel, bucket, ratio=ratio, tuner=tuner.state, **_common(bucket, o))
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.with_gradient)


def _common(bucket: Bucket, directions: Tensor) -> dict[str, Any]:
    """Return the arguments of both kernels, given (weights, …), each laid out as its weight."""
    return {
        "hyper": bucket.handle.hyper,
        "found_inf": bucket.found_inf,
        "step_count": bucket.step_count,
        "first": directions.data_ptr(),
        "size": directions[0].numel(),
        "N": DTYPES[directions.dtype],
        "HAS_LOW": bool(bucket.x_low),
    }
