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
from .quantize import SIGNED_TOP, UNSIGNED_TOP
from .reduce import REDUCE_BLOCK
from .states import load_state, store_state
from .storage import array


@triton.jit
def base_update(OP: tl.constexpr, T: tl.constexpr, g, x, states, i, limit, c):
    """The update u of the base for the elements i; its state moves. A kind reads only its own.

    OP is the kind, and how many elements share a scale of the state's codes, 0 without codes.
    """
    KIND: tl.constexpr = OP[0]
    BLOCK: tl.constexpr = OP[1]
    if KIND == "sgd":
        u = sgd(g, x, c)
    else:
        state0 = load_state(states, i, limit, T, BLOCK, SIGNED_TOP)
        if KIND == "momentum":
            u, state0 = momentum(g, x, state0, c)
        elif KIND == "lion":
            u, state0 = lion(g, x, state0, c)
        else:
            state1 = load_state(states, i, limit, T, BLOCK, UNSIGNED_TOP)
            u, state0, state1 = adam(g, x, state0, state1, c)
            store_state(state1, states, i, limit, BLOCK, UNSIGNED_TOP)
        store_state(state0, states, i, limit, BLOCK, SIGNED_TOP)
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
