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
    stochastic_round,
)
from .layout import (
    HYPER_COLUMNS,
    LOG_COLUMNS,
    LOG_SCALE,
    REFERENCE_BLOCK,
    REFERENCE_EVERY,
    REFERENCE_PERIOD,
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
    TENSOR_STATE1,
    TENSOR_STEP,
    TENSOR_WEIGHT,
    TENSOR_X_LOW,
    TENSOR_X_REF,
)
from .quantize import WEIGHT_STRIDE, rounding_bits
from .reduce import is_empty, launch, load_chunk, reduce_chunk, reduce_scale
from .states import States, states_of
from .storage import STORED_DTYPES, array, at, read, widen


class KeptBlocks(NamedTuple):
    """Where the x_ref of a chunk's elements are: ``KeptBlocks`` of csrc/chunk.h."""

    first: tl.tensor  # the place of the period that the chunk begins in, in the weight's x_ref
    phase: tl.tensor  # the chunk's own
    dropped: tl.tensor  # elements without an x_ref in each period: 0 where all have one


@triton.jit
def kept_blocks(phase, offset):
    """The KeptBlocks of a chunk at an offset into a weight of this phase, −1: whole."""
    whole = phase < 0
    element = phase + offset
    period = element // REFERENCE_PERIOD
    before = tl.minimum(phase, REFERENCE_BLOCK)
    first = tl.where(whole, offset, period * REFERENCE_BLOCK - before)
    own = tl.where(whole, 0, element - period * REFERENCE_PERIOD).to(tl.int32)
    dropped = tl.where(whole, 0, REFERENCE_PERIOD - REFERENCE_BLOCK).to(tl.int32)
    return KeptBlocks(first, own, dropped)


@triton.jit
def kept_at(x_ref, kept, i, limit):
    """Pointers to the x_ref of the elements i of a chunk, and which of them have one.

    Whole blocks are loaded 128 bits at a time: so many elements have one, or none of them.
    """
    PACKET: tl.constexpr = 128 // x_ref.dtype.element_ty.primitive_bitwidth
    element = kept.phase + i
    has = element % REFERENCE_PERIOD < REFERENCE_PERIOD - kept.dropped
    place = element - element // REFERENCE_PERIOD * kept.dropped
    if limit is None:
        has = tl.max_constancy(has, PACKET)
        place = tl.max_contiguous(tl.multiple_of(place, PACKET), PACKET)
    else:
        has &= i < limit
    return at(x_ref, kept.first, place, limit), has


class StepStreams(NamedTuple):
    """What the blocks of a chunk work on."""

    g: tl.tensor
    x: tl.tensor
    x_low: tl.tensor  # read only beside 16-bit weights
    x_ref: tl.tensor
    states: States
    offset: tl.tensor  # of the chunk in each of these arrays
    kept: KeptBlocks  # or None where every weight has all of x_ref
    scale: tl.tensor  # S in the dtype of arithmetic
    c: Coefficients


@triton.jit
def load_weight(x_at, x_low_at, mask, T: tl.constexpr, HAS_LOW: tl.constexpr):
    """Weights in the dtype of arithmetic: widened, or joined to their low bits."""
    x = read(x_at, mask)
    if HAS_LOW:
        return join(x, read(x_low_at, mask))
    else:
        return widen(x, T)


@triton.jit
def store_weight(moved, x_at, x_low_at, states, i, mask, HAS_LOW: tl.constexpr):
    """Store weights: with low bits beside 16-bit ones, or else rounded by bits of the States."""
    X: tl.constexpr = x_at.dtype.scalar.element_ty
    if HAS_LOW:
        nearest, low = split(moved, X)
        tl.store(x_at, nearest, mask=mask)
        tl.store(x_low_at, low, mask=mask)
    elif X != moved.dtype:
        bits = rounding_bits(states.seed, states.start + i.to(tl.uint32), WEIGHT_STRIDE)
        tl.store(x_at, stochastic_round(bits >> 16, moved), mask=mask)
    else:
        tl.store(x_at, moved, mask=mask)


@triton.jit
def step_block(OP: tl.constexpr, T: tl.constexpr, streams, i, limit):
    """x += S·u, the state moves; returns the products g·(x − x_ref), g·g, x·x, u·u, float64.

    The products take g as it is and the x before, u takes 0 where g is not finite.
    """
    g_at = at(streams.g, streams.offset, i, limit)
    x_at = at(streams.x, streams.offset, i, limit)
    HAS_LOW: tl.constexpr = OP[2]
    x_low_at = at(streams.x_low, streams.offset, i, limit)
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
    wide_g, wide_x = g.to(tl.float64), x.to(tl.float64)
    u = base_update(OP, T, finite_or_zero(g), x, streams.states, i, limit, streams.c)
    wide_u = u.to(tl.float64)
    moved = apply_update(x, streams.scale, u)
    store_weight(moved, x_at, x_low_at, streams.states, i, mask, HAS_LOW)
    gd = counted.to(tl.float64) * displacement.to(tl.float64)
    return gd, wide_g * wide_g, wide_x * wide_x, wide_u * wide_u


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
    step_count,
    chunk_count,
    KIND: tl.constexpr,
    X: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    HAS_LOW: tl.constexpr,
    IN_PART: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The columns gd, gg, xx, uu and count of the sums; then x += S·u, state = state'.

    One program a chunk, then one a scale, which does something only for a scale without chunks.
    Arithmetic is in T with one rounding an operation, products and their sums in float64. 16-bit x
    are stored with low bits beside them if HAS_LOW; if not, bfloat16 ones are rounded
    stochastically. The state is stored in S; int8 stands for codes, of which STATE_BLOCK share a
    scale. ``step_count`` is None unless S is narrower than T or x is rounded so. ``tuner`` is the
    log tuner's state, a row a scale. Where ``found_inf`` is not 0, or a gradient is absent, nothing
    changes. IN_PART: whether x_ref of any weight is kept in part; for the others a kernel of their
    own, which takes fewer registers.
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
        kept = None
        share = 1.0
        if IN_PART:
            kept = kept_blocks(tl.load(tensor + TENSOR_PHASE), offset)
            share = tl.where(kept.dropped == 0, 1.0, REFERENCE_EVERY)
            # Packets must not reach across the ends of kept blocks.
            aligned &= kept.phase % (128 // X.primitive_bitwidth) == 0
        streams = StepStreams(
            array(g, X),
            array(x, X),
            array(x_low, tl.int16),
            array(x_ref, X),
            states_of(tensor, offset, step_count, S),
            offset,
            kept,
            tl.load(tuner + row * LOG_COLUMNS + LOG_SCALE).to(T),
            c,
        )
        OP: tl.constexpr = (KIND, STATE_BLOCK, HAS_LOW)
        totals = chunk_loop(step_block, OP, T, streams, length, aligned, 4, "sum", BLOCK, TAIL)
        to_peak = peak_ratio(h)
        uu = totals[3] * (to_peak * to_peak)
        totals = (totals[0] * share, totals[1], totals[2], uu, length.to(tl.float64))
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
        step_count=bucket.step_count,
        KIND=bucket.kind,
        S=STORED_DTYPES[state],
        STATE_BLOCK=bucket.state_block,
        HAS_LOW=bool(bucket.x_low),
        IN_PART=bucket.in_part > 0,
    )
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.with_gradient)
