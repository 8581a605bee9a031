"""The vector ops in Triton: one launch an op for all weights of a bucket.

Same functions as ``vectors/reference.py``; elementwise results agree with it to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanic_fused.backends.layout import CPU_CHUNK, GPU_CHUNK, compute_dtype
from mechanic_fused.vectors.reference import AdaRemOptions, Stream

from . import formulas
from .chunk_loop import chunk_loop
from .layout import PARTIAL_COLUMNS, STREAM_COLUMNS, columns
from .reduce import load_chunk
from .storage import DTYPES, OPTIONS, array, at, narrow, on, read, sizes, widen

CHUNK = {"cpu": CPU_CHUNK, "cuda": GPU_CHUNK}

NARROW, WIDE = "narrow", "wide"

STREAMS = {
    "step_along": (NARROW, NARROW, WIDE),
    "scaled_copy": (WIDE, NARROW),
    "axpby": (WIDE, NARROW),
    "difference_dots": (WIDE, NARROW, NARROW),
    "dots": (NARROW, NARROW, WIDE),
    "abs_max": (NARROW,),
    "adarem": (NARROW, NARROW, WIDE),
}
"""Op → which of its streams have the weights' dtype (NARROW) and which the dtype of arithmetic
(WIDE). ``scaled_copy`` is ``axpby`` with a = 0, which must not read s."""

PARTIALS = {"difference_dots": 2, "dots": 4, "abs_max": 1, "adarem": 1}
"""Op → how many partial results a chunk has: sums, or one maximum; 0 for the others."""

ADAREM_LR, ADAREM_BETA, ADAREM_BOOST, ADAREM_DECAY, ADAREM_EPS = columns(AdaRemOptions._fields)


class VectorStreams(NamedTuple):
    """What the blocks of a chunk work on."""

    first: tl.tensor
    second: tl.tensor
    third: tl.tensor
    offset: tl.tensor  # of the chunk in each of these arrays
    c: tl.tensor  # the op's coefficients in the dtype of arithmetic, or None


@triton.jit
def adarem_coefficients(numbers, peaks, tensor, T: tl.constexpr):
    """AdaRem's coefficients, from its options and max|m| of the chunk's tensor."""
    beta = tl.load(numbers + ADAREM_BETA)
    gain = tl.load(numbers + ADAREM_BOOST) / (
        tl.load(peaks + tensor) + tl.load(numbers + ADAREM_EPS)
    )
    return formulas.AdaRem(
        tl.load(numbers + ADAREM_LR).to(T),
        beta.to(T),
        (1.0 - beta).to(T),
        gain.to(T),
        tl.load(numbers + ADAREM_DECAY).to(T),
    )


@triton.jit
def bits_of_abs(x):
    """The bits of |x| as float64: they compare as magnitudes do; those of NaN are the largest."""
    return tl.abs(x.to(tl.float64)).to(tl.int64, bitcast=True)


@triton.jit
def vector_block(OP: tl.constexpr, T: tl.constexpr, streams, i, limit):
    """One block of an op: writes its results; returns its products, bits of magnitudes, or None."""
    first = at(streams.first, streams.offset, i, limit)
    second = at(streams.second, streams.offset, i, limit)
    third = at(streams.third, streams.offset, i, limit)
    mask = None if limit is None else i < limit
    if OP == "step_along":
        x = formulas.step_along(widen(read(second, mask), T), streams.c, read(third, mask))
        tl.store(first, narrow(x, first.dtype.element_ty), mask=mask)
    elif OP == "scaled_copy":
        tl.store(first, streams.c * widen(read(second, mask), T), mask=mask)
    elif OP == "axpby":
        s = streams.c[0] * read(first, mask) + streams.c[1] * widen(read(second, mask), T)
        tl.store(first, s, mask=mask)
    elif OP == "difference_dots":
        s = read(first, mask).to(tl.float64)
        difference = widen(read(second, mask), T) - widen(read(third, mask), T)
        tl.store(first, difference, mask=mask)
        s_new = difference.to(tl.float64)
        return s_new * s, s_new * s_new
    elif OP == "dots":
        g = widen(read(first, mask), T).to(tl.float64)
        l = widen(read(second, mask), T).to(tl.float64)  # noqa: E741
        p = read(third, mask).to(tl.float64)
        return g * g, g * l, l * l, g * p
    elif OP == "abs_max":
        return (bits_of_abs(widen(read(first, mask), T)),)
    else:
        g = formulas.finite_or_zero(widen(read(second, mask), T))
        x = widen(read(first, mask), T)
        u, m = formulas.adarem(g, x, read(third, mask), streams.c)
        tl.store(first, narrow(x + u, first.dtype.element_ty), mask=mask)
        tl.store(third, m, mask=mask)
        # Beyond the limit x, g and m are 0, and so is the new m.
        return (bits_of_abs(m),)


@triton.jit
def op_kernel(
    streams,
    chunks,
    partials,
    numbers,
    peaks,
    OP: tl.constexpr,
    COUNT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One op, a program a chunk; writes the chunk's COUNT partial results to ``partials``, float64.

    ``numbers`` are float64 and rounded to T here, so that other numbers need no other kernel;
    ``peaks`` is (weights,) float64. A, B and C are the streams' dtypes, T is that of arithmetic.
    """
    chunk = tl.program_id(0).to(tl.int64)
    tensor, offset, length = load_chunk(chunks, chunk)
    first = tl.load(streams + tensor * STREAM_COLUMNS)
    second = tl.load(streams + tensor * STREAM_COLUMNS + 1)
    third = tl.load(streams + tensor * STREAM_COLUMNS + 2)
    c = None
    if OP == "step_along":
        c = tl.load(numbers).to(T)
    elif OP == "scaled_copy":
        c = tl.load(numbers + 1).to(T)
    elif OP == "axpby":
        c = tl.load(numbers).to(T), tl.load(numbers + 1).to(T)
    elif OP == "adarem":
        c = adarem_coefficients(numbers, peaks, tensor, T)
    aligned = (first | second | third) % 16 == 0
    arrays = VectorStreams(array(first, A), array(second, B), array(third, C), offset, c)
    REDUCE: tl.constexpr = "max" if COUNT == 1 else "sum"
    totals = chunk_loop(vector_block, OP, T, arrays, length, aligned, COUNT, REDUCE, BLOCK, TAIL)
    for k in tl.static_range(COUNT):
        total = totals[k].to(tl.float64, bitcast=True) if COUNT == 1 else totals[k]
        tl.store(partials + chunk * PARTIAL_COLUMNS + k, total)


def step_along(part: Any, x: Stream, w: Stream, d: Stream, c: Tensor) -> None:
    """x = round(w − c·d)."""
    _launch(part, "step_along", x, w, d, numbers=c)


def axpby(part: Any, s: Stream, x: Stream, a: float, c: float) -> None:
    """s = a·s + c·x; where a = 0, s is not read."""
    _launch(part, "axpby" if a else "scaled_copy", s, x, numbers=_sent(part, [a, c]))


def difference_dots(part: Any, s: Stream, a: Stream, b: Stream) -> Tensor:
    """s' = a − b; returns s'·s and s'·s'; s' is stored in s."""
    _launch(part, "difference_dots", s, a, b)
    return part.folded()[:2]


def dots(part: Any, g: Stream, l: Stream, p: Stream) -> Tensor:  # noqa: E741
    """Return g·g, g·l, l·l and g·p."""
    _launch(part, "dots", g, l, p)
    return part.folded()


def abs_max(part: Any, a: Stream) -> Tensor:
    """Return max|a| of each weight."""
    _launch(part, "abs_max", a, dtype=a[0].dtype)
    return part.peaks()


def adarem(
    part: Any, x: Stream, g: Stream, m: Stream, peaks: Tensor, options: AdaRemOptions
) -> Tensor:
    """One step of AdaRem; returns max|m| of the new m."""
    _launch(part, "adarem", x, g, m, numbers=_sent(part, options), peaks=peaks)
    return part.peaks()


def _launch(
    part: Any,
    op: str,
    *streams: Stream,
    numbers: Tensor | None = None,
    peaks: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    if not len(part.chunks):
        return
    if part.handle is None:
        part.handle = part.chunks.to(part.device)
    dtype = dtype or part.dtype
    types = {NARROW: DTYPES[dtype], WIDE: DTYPES[compute_dtype(dtype)]}
    # An absent stream has address 0; its dtype is not used.
    a, b, c = (types[width] for width in (*STREAMS[op], WIDE, WIDE)[:3])
    with on(part.device):
        op_kernel[(len(part.handle),)](
            streams=_to_device(part.addresses(streams), part.device),
            chunks=part.handle,
            partials=part.partials,
            numbers=numbers,
            peaks=peaks,
            OP=op,
            COUNT=PARTIALS.get(op, 0),
            A=a,
            B=b,
            C=c,
            T=types[WIDE],
            **sizes(dtype),
            **OPTIONS,
        )


def _sent(part: Any, numbers: Any) -> Tensor:
    # As a tensor, since Triton would convert Python numbers to float32.
    return _to_device(torch.tensor(numbers, dtype=torch.float64), part.device)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    # Without waiting: torch reuses pinned memory only after the copy from it is done, and device
    # memory only for what runs later on the same stream.
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)
