"""The base's own state and Δ of a chunk as numbers of the arithmetic, however they are stored."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .formulas import hash32, stochastic_round
from .layout import (
    TENSOR_ELEMENT,
    TENSOR_NUMBER,
    TENSOR_SCALES0,
    TENSOR_SCALES1,
    TENSOR_STATE0,
    TENSOR_STATE1,
)
from .quantize import (
    LINEAR_STRIDE,
    LINEAR_TOP,
    SIGNED_STRIDE,
    SIGNED_TOP,
    TURN,
    UNSIGNED_STRIDE,
    UNSIGNED_TOP,
    dequantize,
    quantize,
    rounding_bits,
)
from .storage import array, at, narrow, read, widen


class States(NamedTuple):
    """Where the states of a chunk are, and what decides how they are rounded."""

    first: tl.tensor  # a momentum
    second: tl.tensor  # v
    scales0: tl.tensor  # of codes
    scales1: tl.tensor
    offset: tl.tensor  # of the chunk
    seed: tl.tensor  # the weight's part of how it is rounded
    start: tl.tensor  # the index of the chunk's first element in the whole weight, uint32


@triton.jit
def states_of(tensor, offset, step_count, S: tl.constexpr):
    """The States of a chunk at an offset into a weight with this row of the tensor table."""
    # Zeros that nothing reads, since a function cannot return None.
    seed = tl.zeros((), tl.uint32)
    start = tl.zeros((), tl.uint32)
    if step_count is not None:
        start = (tl.load(tensor + TENSOR_ELEMENT) + offset).to(tl.uint32)
        turns = tl.load(step_count).to(tl.int64).to(tl.uint32) * TURN
        seed = hash32(tl.load(tensor + TENSOR_NUMBER).to(tl.uint32)) + turns
    V: tl.constexpr = tl.uint8 if S == tl.int8 else S
    return States(
        array(tl.load(tensor + TENSOR_STATE0), S),
        array(tl.load(tensor + TENSOR_STATE1), V),
        array(tl.load(tensor + TENSOR_SCALES0), tl.float32),
        array(tl.load(tensor + TENSOR_SCALES1), tl.float32),
        offset,
        seed,
        start,
    )


@triton.jit
def load_codes(base, scales, offset, i, limit, BLOCK: tl.constexpr, TOP: tl.constexpr):
    """The elements i of an array of codes, of which BLOCK share a scale; TOP names the format."""
    mask = None if limit is None else i < limit
    q = read(at(base, offset, i, limit), mask).to(tl.int32)
    # The same number, since chunks begin with a block; each way spills in another kernel.
    if TOP == LINEAR_TOP:
        number = offset // BLOCK + i // BLOCK
    else:
        number = (offset + i) // BLOCK
    return dequantize(q, read(scales + number, mask), TOP)


@triton.jit
def store_codes(x, base, scales, states, i, limit, BLOCK: tl.constexpr, TOP: tl.constexpr):
    """Store the elements i of an array of codes, rounded by random bits as the States say."""
    STRIDE: tl.constexpr = (
        SIGNED_STRIDE
        if TOP == SIGNED_TOP
        else (UNSIGNED_STRIDE if TOP == UNSIGNED_TOP else LINEAR_STRIDE)
    )
    mask = None if limit is None else i < limit
    bits = rounding_bits(states.seed, states.start + i.to(tl.uint32), STRIDE)
    q, of_blocks = quantize(x, bits, BLOCK, TOP)
    BLOCKS: tl.constexpr = i.shape[0] // BLOCK
    first = tl.min(tl.reshape(i, (BLOCKS, BLOCK)), 1)
    scales_mask = None if limit is None else first < limit
    tl.store(scales + (states.offset + first) // BLOCK, of_blocks, mask=scales_mask)
    tl.store(at(base, states.offset, i, limit), q.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_state(states, i, limit, T: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr):
    """The elements i of a state, which TOP names; BLOCK of them share a scale, if it has codes."""
    base = states.first if TOP == SIGNED_TOP else states.second
    if BLOCK == 0:
        mask = None if limit is None else i < limit
        return widen(read(at(base, states.offset, i, limit), mask), T)
    else:
        scales = states.scales0 if TOP == SIGNED_TOP else states.scales1
        return load_codes(base, scales, states.offset, i, limit, BLOCK, TOP)


@triton.jit
def store_state(x, states, i, limit, BLOCK: tl.constexpr, TOP: tl.constexpr):
    """Store the elements i of a state: rounded by random bits, or to nearest in 16 bits."""
    base = states.first if TOP == SIGNED_TOP else states.second
    if BLOCK == 0:
        S: tl.constexpr = base.dtype.element_ty
        mask = None if limit is None else i < limit
        pointers = at(base, states.offset, i, limit)
        # Rounded to nearest, v could not fall.
        if S == tl.bfloat16 and TOP == UNSIGNED_TOP:
            bits = rounding_bits(states.seed, states.start + i.to(tl.uint32), UNSIGNED_STRIDE)
            tl.store(pointers, stochastic_round(bits >> 16, x), mask=mask)
        else:
            tl.store(pointers, narrow(x, S), mask=mask)
    else:
        scales = states.scales0 if TOP == SIGNED_TOP else states.scales1
        store_codes(x, base, scales, states, i, limit, BLOCK, TOP)
