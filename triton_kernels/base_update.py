"""The base's update of a block of a chunk, and the counts of the weights' steps."""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import adam, lion, momentum, sgd
from .layout import (
    SPAN_COLUMNS,
    SPAN_FIRST_TENSOR,
    SPAN_TENSORS,
    TENSOR_COLUMNS,
    TENSOR_GRADIENT,
    TENSOR_STEP,
)
from .reduce import REDUCE_BLOCK
from .storage import array, narrow, read, widen


@triton.jit
def base_update(KIND: tl.constexpr, T: tl.constexpr, g, x, state0_at, state1_at, mask, c):
    """The update u of the base; its state at these pointers moves. A kind reads only its own."""
    S: tl.constexpr = state0_at.dtype.element_ty
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
    return u


@triton.jit
def advance_steps(row, tensors, spans):
    """step += 1 for the weights of a scale that have a gradient."""
    first = tl.load(spans + row * SPAN_COLUMNS + SPAN_FIRST_TENSOR)
    count = tl.load(spans + row * SPAN_COLUMNS + SPAN_TENSORS)
    start = tl.full((), 0, tl.int64)
    while start < count:
        i = start + tl.arange(0, REDUCE_BLOCK)
        tensor = tensors + (first + i) * TENSOR_COLUMNS
        present = tl.load(tensor + TENSOR_GRADIENT, mask=i < count, other=0) != 0
        steps = array(tl.load(tensor + TENSOR_STEP, mask=present, other=0), tl.float32)
        tl.store(steps, tl.load(steps, mask=present, other=0.0) + 1.0, mask=present)
        start += REDUCE_BLOCK
