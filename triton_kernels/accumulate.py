"""accumulate: g·Δ and g·g with the old Δ; the base's state and Δ move on by one update u."""

from __future__ import annotations

import triton
import triton.language as tl

from mechanic_fused.bucket import Bucket

from .formulas import adam, coefficients, lion, momentum, random_bits16, seed, sgd
from .storage import (
    CHUNK_COLUMNS,
    DELTA,
    DTYPES,
    GRADIENT,
    GROUP,
    NUMBER,
    SCALE,
    STATE0,
    STATE1,
    STEP,
    TENSOR_COLUMNS,
    WEIGHT,
    aligned_at,
    at,
    narrow,
    read,
    stochastic_round,
    widen,
)
from .sums import FOLD, fold, launch, reduce_chunk


@triton.jit
def move(
    g_at,
    x_at,
    delta_at,
    state0_at,
    state1_at,
    mask,
    x_mask,
    c,
    key,
    element,
    KIND: tl.constexpr,
    T: tl.constexpr,
):
    """One block: Δ += u, the state moves on; returns the products g·Δ (old Δ) and g·g, float64.

    g enters the products as it is, and u as 0 where it is not finite. With a ``key`` the new Δ is
    rounded to bfloat16 by random bits, of the ``key`` and each element's number in its chunk.
    """
    S: tl.constexpr = state0_at.dtype.element_ty
    g = widen(read(g_at, mask), T) * c.gradient
    x = widen(read(x_at, x_mask), T)
    delta = widen(read(delta_at, mask), T)
    wide_g = g.to(tl.float64)
    g = tl.where(g - g == 0, g, 0.0)
    if KIND == "sgd":
        u = sgd(g, x, c)
    elif KIND == "momentum":
        u, state0 = momentum(g, x, widen(read(state0_at, mask), T), c)
    elif KIND == "lion":
        u, state0 = lion(g, x, widen(read(state0_at, mask), T), c)
    else:
        u, state0, state1 = adam(
            g, x, widen(read(state0_at, mask), T), widen(read(state1_at, mask), T), c
        )
        tl.store(state1_at, narrow(state1, S), mask=mask)
    if KIND != "sgd":
        tl.store(state0_at, narrow(state0, S), mask=mask)
    if key is None:
        tl.store(delta_at, delta + u, mask=mask)
    else:
        bits = random_bits16(key, element.to(tl.uint32))
        tl.store(delta_at, stochastic_round(bits, delta + u), mask=mask)
    return wide_g * delta.to(tl.float64), wide_g * wide_g


@triton.jit
def advance_steps(row, tensors, spans):
    """step += 1 for the weights of a scale that have a gradient."""
    first = tl.load(spans + row * 4 + 2)
    count = tl.load(spans + row * 4 + 3)
    start = tl.full((), 0, tl.int64)
    while start < count:
        i = start + tl.arange(0, FOLD)
        tensor = tensors + (first + i) * TENSOR_COLUMNS
        present = tl.load(tensor + GRADIENT, mask=i < count, other=0) != 0
        steps = tl.load(tensor + STEP, mask=present, other=0).to(tl.pointer_type(tl.float32))
        tl.store(steps, tl.load(steps, mask=present, other=0.0) + 1.0, mask=present)
        start += FOLD


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
    clock,
    chunk_count,
    KIND: tl.constexpr,
    X: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """sums[:, 0] = Σ g·Δ and sums[:, 2] = Σ g·g over the old Δ; then Δ = Δ + u, state = state'.

    A program a chunk, then one a scale, which matters for scales without chunks only. Arithmetic
    in T, one rounding an operation; products and their sums in float64; Δ is kept in D and the
    state in S; ``clock``, the count of steps, is there where D is narrower than T. Where found_inf
    is not 0, or a gradient is absent, nothing changes.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0)
    if program < chunk_count:
        tensor = tensors + tl.load(chunks + program * CHUNK_COLUMNS) * TENSOR_COLUMNS
        offset = tl.load(chunks + program * CHUNK_COLUMNS + 1)
        length = tl.load(chunks + program * CHUNK_COLUMNS + 2).to(tl.int32)
        g = tl.load(tensor + GRADIENT)
        x = tl.load(tensor + WEIGHT)
        delta = tl.load(tensor + DELTA)
        state0 = tl.load(tensor + STATE0)
        state1 = tl.load(tensor + STATE1)
        step_at = tl.load(tensor + STEP).to(tl.pointer_type(tl.float32))
        row = tl.load(tensor + SCALE)
        h = hyper + tl.load(tensor + GROUP) * 8
        step = tl.load(step_at, mask=(KIND == "adam") | (KIND == "momentum"), other=0.0)
        c = coefficients(h, grad_scale, clip, step, KIND, T)
        key = None
        if clock is not None:
            key = seed(tl.load(clock), tl.load(tensor + NUMBER)) + offset.to(tl.uint32)
        reads_x = (tl.load(h + 4) != 0) | (tl.load(h + 5) != 0)

        # An absent gradient has no elements.
        length = tl.where(g == 0, 0, length)
        x_length = tl.where(reads_x, length, 0)
        # Whole blocks at aligned addresses go 128 bits wide, the rest an element at a time.
        aligned = (g | x | delta | state0 | state1) % 16 == 0
        whole = tl.where(aligned, length // BLOCK, 0)

        gd = tl.zeros((BLOCK,), dtype=tl.float64)
        gg = tl.zeros((BLOCK,), dtype=tl.float64)
        number = 0
        while number < whole:
            i = number * BLOCK + tl.arange(0, BLOCK)
            more_gd, more_gg = move(
                aligned_at(g, offset, X) + i,
                aligned_at(x, offset, X) + i,
                aligned_at(delta, offset, D) + i,
                aligned_at(state0, offset, S) + i,
                aligned_at(state1, offset, S) + i,
                None,
                reads_x,
                c,
                key,
                i,
                KIND,
                T,
            )
            gd += more_gd
            gg += more_gg
            number += 1
        total_gd = tl.sum(gd, 0)
        total_gg = tl.sum(gg, 0)

        gd = tl.zeros((TAIL,), dtype=tl.float64)
        gg = tl.zeros((TAIL,), dtype=tl.float64)
        start = whole * BLOCK
        while start < length:
            i = start + tl.arange(0, TAIL)
            more_gd, more_gg = move(
                at(g, offset, X) + i,
                at(x, offset, X) + i,
                at(delta, offset, D) + i,
                at(state0, offset, S) + i,
                at(state1, offset, S) + i,
                i < length,
                i < x_length,
                c,
                key,
                i,
                KIND,
                T,
            )
            gd += more_gd
            gg += more_gg
            start += TAIL
        total_gd += tl.sum(gd, 0)
        total_gg += tl.sum(gg, 0)
        last = reduce_chunk(program, row, total_gd, total_gg, partials, spans, tickets, 0)
    else:
        row = (program - chunk_count).to(tl.int64)
        last = tl.load(spans + row * 4 + 1) == 0
    if last:
        fold(row, partials, sums, spans, tickets, 0)
        # Only now, when no program reads the counts any more.
        if KIND == "adam" or KIND == "momentum":
            advance_steps(row, tensors, spans)


def accumulate(bucket: Bucket) -> None:
    """Take g·Δ and g·g with the old Δ; move the base's state and Δ on by one update."""
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
        S=DTYPES[state],
        D=DTYPES[bucket.delta[0].dtype],
    )
