"""accumulate: g·Δ and g·g with the old Δ; the base's state and Δ move by one update u."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from mechanic_fused.bucket import Bucket

from .base_update import advance_steps, base_update
from .chunk_loop import chunk_loop
from .formulas import (
    Coefficients,
    coefficients,
    finite_or_zero,
    random_bits16,
    rounding_seed,
    stochastic_round,
)
from .layout import (
    HYPER_COLUMNS,
    SUMS_GD,
    SUMS_GG,
    TENSOR_COLUMNS,
    TENSOR_DELTA,
    TENSOR_DELTA_SCALES,
    TENSOR_ELEMENT,
    TENSOR_GRADIENT,
    TENSOR_GROUP,
    TENSOR_NUMBER,
    TENSOR_SCALE,
    TENSOR_STATE0,
    TENSOR_STATE1,
    TENSOR_STEP,
    TENSOR_WEIGHT,
)
from .quantize import LINEAR_TOP
from .reduce import is_empty, launch, load_chunk, reduce_chunk, reduce_scale
from .states import States, load_codes, states_of, store_codes
from .storage import STORED_DTYPES, array, at, read, widen


class AccumulateStreams(NamedTuple):
    """What the blocks of a chunk work on."""

    g: tl.tensor
    x: tl.tensor
    delta: tl.tensor
    delta_scales: tl.tensor  # of codes
    states: States
    offset: tl.tensor  # of the chunk in each of these arrays
    reads_x: tl.tensor
    x_limit: tl.tensor  # the chunk's length, 0 where x is not read
    c: Coefficients
    seed: tl.tensor  # of the chunk's random bits, or None where Δ is not rounded


@triton.jit
def accumulate_block(OP: tl.constexpr, T: tl.constexpr, streams, i, limit):
    """Δ += u, the state moves; returns the products g·Δ (old Δ) and g·g, float64.

    The products take g as it is, u takes 0 where it is not finite. With a seed the new Δ is rounded
    to bfloat16 by random bits, which depend on the seed and on each element's index in its chunk.
    OP is the kind, and how many elements share a scale of codes, in which Δ then is too.
    """
    BLOCK: tl.constexpr = OP[1]
    g_at = at(streams.g, streams.offset, i, limit)
    x_at = at(streams.x, streams.offset, i, limit)
    delta_at = at(streams.delta, streams.offset, i, limit)
    mask = None if limit is None else i < limit
    x_mask = streams.reads_x if limit is None else i < streams.x_limit
    g = widen(read(g_at, mask), T) * streams.c.gradient
    x = widen(read(x_at, x_mask), T)
    if BLOCK == 0:
        delta = widen(read(delta_at, mask), T)
    else:
        scales = streams.delta_scales
        delta = load_codes(streams.delta, scales, streams.offset, i, limit, BLOCK, LINEAR_TOP)
    wide_g = g.to(tl.float64)
    g = finite_or_zero(g)
    u = base_update(OP, T, g, x, streams.states, i, limit, streams.c)
    if BLOCK != 0:
        new = delta + u
        store_codes(new, streams.delta, scales, streams.states, i, limit, BLOCK, LINEAR_TOP)
    elif streams.seed is None:
        tl.store(delta_at, delta + u, mask=mask)
    else:
        bits = random_bits16(streams.seed, i.to(tl.uint32))
        tl.store(delta_at, stochastic_round(bits, delta + u), mask=mask)
    return wide_g * delta.to(tl.float64), wide_g * wide_g


@triton.jit(do_not_specialize=["chunk_count"])
def accumulate_kernel(
    tensors,
    chunks,
    hyper,
    spans,
    tickets,
    partials,
    sums,
    grad_scale,
    found_inf,
    clip,
    step_count,
    chunk_count,
    KIND: tl.constexpr,
    X: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    STATE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """sums[:, GD] = Σ g·Δ and sums[:, GG] = Σ g·g with the old Δ; then Δ += u, state = state'.

    One program a chunk, then one a scale, which does something only for a scale without chunks.
    Arithmetic is in T with one rounding an operation, products and their sums in float64; Δ is
    stored in D and the state in S, as in step.py. ``step_count`` is None unless one of them is
    narrower than T. Where ``found_inf`` is not 0, or a gradient is absent, nothing changes.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    if program < chunk_count:
        index, offset, length = load_chunk(chunks, program)
        tensor = tensors + index * TENSOR_COLUMNS
        g = tl.load(tensor + TENSOR_GRADIENT)
        x = tl.load(tensor + TENSOR_WEIGHT)
        delta = tl.load(tensor + TENSOR_DELTA)
        state0 = tl.load(tensor + TENSOR_STATE0)
        state1 = tl.load(tensor + TENSOR_STATE1)
        step_at = array(tl.load(tensor + TENSOR_STEP), tl.float32)
        h = hyper + tl.load(tensor + TENSOR_GROUP) * HYPER_COLUMNS
        step = tl.load(step_at, mask=(KIND == "adam") | (KIND == "momentum"), other=0.0)
        c = coefficients(h, grad_scale, clip, step, KIND, T)
        seed = None
        if D == tl.bfloat16:
            number = tl.load(tensor + TENSOR_NUMBER)
            first = tl.load(tensor + TENSOR_ELEMENT) + offset
            seed = rounding_seed(tl.load(step_count), number) + first.to(tl.uint32)
        reads_x = (c.l2 != 0) | (c.decay != 0)
        # An absent gradient has no elements.
        length = tl.where(g == 0, 0, length)
        aligned = (g | x | delta | state0 | state1) % 16 == 0
        streams = AccumulateStreams(
            array(g, X),
            array(x, X),
            array(delta, D),
            array(tl.load(tensor + TENSOR_DELTA_SCALES), tl.float32),
            states_of(tensor, offset, step_count, S),
            offset,
            reads_x,
            tl.where(reads_x, length, 0),
            c,
            seed,
        )
        OP: tl.constexpr = (KIND, STATE_BLOCK)
        totals = chunk_loop(
            accumulate_block, OP, T, streams, length, aligned, 2, "sum", BLOCK, TAIL
        )
        # Not before the loop, which needs the registers.
        row = tl.load(tensor + TENSOR_SCALE)
        last = reduce_chunk(program, row, totals, partials, spans, tickets, (SUMS_GD, SUMS_GG))
    else:
        row = (program - chunk_count).to(tl.int64)
        last = is_empty(row, spans)
    if last:
        reduce_scale(row, partials, sums, spans, tickets, (SUMS_GD, SUMS_GG))
        # Only now, when no program reads the counts any more.
        if KIND == "adam" or KIND == "momentum":
            advance_steps(row, tensors, spans)


def accumulate(bucket: Bucket) -> None:
    """Take g·Δ and g·g with the old Δ; move the base's state and Δ by one update."""
    state = bucket.states[0][0].dtype if bucket.states[0] else bucket.compute_dtype
    launch(
        accumulate_kernel,
        bucket,
        hyper=bucket.handle.hyper,
        grad_scale=bucket.grad_scale,
        found_inf=bucket.found_inf,
        clip=bucket.clip,
        step_count=bucket.step_count,
        KIND=bucket.kind,
        S=STORED_DTYPES[state],
        STATE_BLOCK=bucket.state_block,
        D=STORED_DTYPES[bucket.delta[0].dtype],
    )
