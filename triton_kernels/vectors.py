"""The vector verbs in Triton: one launch a verb for all weights of a part.

Same functions as vectors_reference.py; elementwise results agree with it to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanic_fused.backends.layout import CPU_CHUNK, GPU_CHUNK, compute_dtype
from mechanic_fused.vectors.reference import AdaRemOptions, Stream

from .storage import (
    CHUNK_COLUMNS,
    DTYPES,
    OPTIONS,
    aligned_at,
    at,
    narrow,
    on,
    read,
    sizes,
    widen,
)

CHUNK = {"cpu": CPU_CHUNK, "cuda": GPU_CHUNK}
"""Elements of a chunk on a GPU, where one is a program's work: short enough that the last programs
of a launch end together, long enough (8 to 32 blocks) that starting one costs little."""

NARROW, WIDE = "narrow", "wide"

STREAMS = {
    "step_along": (NARROW, NARROW, WIDE),
    "put": (WIDE, NARROW),
    "axpby": (WIDE, NARROW),
    "difference_dots": (WIDE, NARROW, NARROW),
    "dots": (NARROW, NARROW, WIDE),
    "abs_max": (NARROW,),
    "adarem": (NARROW, NARROW, WIDE),
}
"""Verb → which streams are of the part's dtype and which of that of the arithmetic. put: add, but
what was there is not read."""

PARTIALS = {"difference_dots": 2, "dots": 4, "abs_max": 1, "adarem": 1}
"""Verb → how many partial results a chunk leaves; 0 for the others."""


class AdaRem(NamedTuple):
    """AdaRem's coefficients: made in float64 once a chunk, in the dtype of the arithmetic here."""

    lr: tl.tensor
    beta: tl.tensor
    rest: tl.tensor  # 1 - beta
    reach: tl.tensor  # λᵗ / (max|m| + ε)
    decay: tl.tensor


@triton.jit
def adarem_coefficients(numbers, peaks, tensor, T: tl.constexpr):
    """Of the options in AdaRemOptions' order, and of max|m| of the chunk's tensor."""
    beta = tl.load(numbers + 1)
    reach = tl.load(numbers + 2) / (tl.load(peaks + tensor) + tl.load(numbers + 4))
    return AdaRem(
        tl.load(numbers).to(T),
        beta.to(T),
        (1.0 - beta).to(T),
        reach.to(T),
        tl.load(numbers + 3).to(T),
    )


@triton.jit
def adarem_step(g, x, m, c):
    """x − lr·((1 + λᵗ·b)·g + decay·x) with b = sign(g)·m/(max|m| + ε); m = β·m + (1−β)·g."""
    sign = (g > 0).to(m.dtype) - (g < 0).to(m.dtype)
    adjusted = (1.0 + c.reach * (sign * m)) * g
    return x - c.lr * (adjusted + c.decay * x), c.beta * m + c.rest * g


@triton.jit
def bits_of_size(x):
    """The bits of |x| as float64: they compare as sizes do, and those of a NaN are the largest."""
    return tl.abs(x.to(tl.float64)).to(tl.int64, bitcast=True)


@triton.jit
def act(first, second, third, mask, c, VERB: tl.constexpr, T: tl.constexpr):
    """One block of a verb: write what it writes; return its products, or sizes, or nothing."""
    if VERB == "step_along":
        x = widen(read(second, mask), T) - c * read(third, mask)
        tl.store(first, narrow(x, first.dtype.element_ty), mask=mask)
    elif VERB == "put":
        tl.store(first, c * widen(read(second, mask), T), mask=mask)
    elif VERB == "axpby":
        s = c[0] * read(first, mask) + c[1] * widen(read(second, mask), T)
        tl.store(first, s, mask=mask)
    elif VERB == "difference_dots":
        old = read(first, mask).to(tl.float64)
        fresh = widen(read(second, mask), T) - widen(read(third, mask), T)
        tl.store(first, fresh, mask=mask)
        new = fresh.to(tl.float64)
        return new * old, new * new
    elif VERB == "dots":
        g = widen(read(first, mask), T).to(tl.float64)
        l = widen(read(second, mask), T).to(tl.float64)  # noqa: E741
        p = read(third, mask).to(tl.float64)
        return g * g, g * l, l * l, g * p
    elif VERB == "abs_max":
        return (bits_of_size(widen(read(first, mask), T)),)
    else:
        g = widen(read(second, mask), T)
        # An element that is not finite counts as 0.
        g = tl.where(g - g == 0, g, 0.0)
        x, m = adarem_step(g, widen(read(first, mask), T), read(third, mask), c)
        tl.store(first, narrow(x, first.dtype.element_ty), mask=mask)
        tl.store(third, m, mask=mask)
        # Beyond the mask x, g and m are 0, and so is the new m.
        return (bits_of_size(m),)


@triton.jit
def gathered(total, found, COUNT: tl.constexpr):
    """Two blocks' products added, or the larger of their sizes."""
    if COUNT == 1:
        return tl.maximum(total, found)
    else:
        return total + found


@triton.jit
def folded(total, COUNT: tl.constexpr):
    """The sum of a block's products, or the largest of its sizes' bits."""
    if COUNT == 1:
        return tl.max(total, 0)
    else:
        return tl.sum(total, 0)


@triton.jit
def walk(
    first,
    second,
    third,
    offset,
    start,
    stop,
    c,
    VERB: tl.constexpr,
    COUNT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Blocks of SIZE elements from start to stop; where WHOLE they are whole and aligned.

    Returns four partial results, of which the first COUNT mean something.
    """
    P: tl.constexpr = tl.int64 if COUNT == 1 else tl.float64
    p0 = tl.zeros((SIZE,), dtype=P)
    p1 = p0
    p2 = p0
    p3 = p0
    while start < stop:
        i = start + tl.arange(0, SIZE)
        if WHOLE:
            a = aligned_at(first, offset, A) + i
            b = aligned_at(second, offset, B) + i
            found = act(a, b, aligned_at(third, offset, C) + i, None, c, VERB, T)
        else:
            a = at(first, offset, A) + i
            b = at(second, offset, B) + i
            found = act(a, b, at(third, offset, C) + i, i < stop, c, VERB, T)
        # Only what a verb has is carried through the loop.
        if COUNT > 0:
            p0 = gathered(p0, found[0], COUNT)
        if COUNT > 1:
            p1 = gathered(p1, found[1], COUNT)
        if COUNT > 2:
            p2 = gathered(p2, found[2], COUNT)
            p3 = gathered(p3, found[3], COUNT)
        start += SIZE
    if COUNT > 0:
        p0 = folded(p0, COUNT)
    if COUNT > 1:
        p1 = folded(p1, COUNT)
    if COUNT > 2:
        p2 = folded(p2, COUNT)
        p3 = folded(p3, COUNT)
    return p0, p1, p2, p3


@triton.jit
def verb_kernel(
    streams,
    chunks,
    partials,
    numbers,
    peaks,
    VERB: tl.constexpr,
    COUNT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One verb, a program a chunk; ``partials`` gets the chunk's COUNT partial results, float64.

    ``numbers`` are float64, rounded to T here, so that a new number is no new kernel; ``peaks`` is
    (weights,) float64. A, B and C are the streams' dtypes, T that of the arithmetic.
    """
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + chunk * CHUNK_COLUMNS)
    offset = tl.load(chunks + chunk * CHUNK_COLUMNS + 1)
    length = tl.load(chunks + chunk * CHUNK_COLUMNS + 2).to(tl.int32)
    first = tl.load(streams + tensor * 4)
    second = tl.load(streams + tensor * 4 + 1)
    third = tl.load(streams + tensor * 4 + 2)
    c = None
    if VERB == "step_along":
        c = tl.load(numbers).to(T)
    elif VERB == "put":
        c = tl.load(numbers + 1).to(T)
    elif VERB == "axpby":
        c = tl.load(numbers).to(T), tl.load(numbers + 1).to(T)
    elif VERB == "adarem":
        c = adarem_coefficients(numbers, peaks, tensor, T)

    # Whole blocks at aligned addresses go 128 bits wide, the rest an element at a time.
    whole = tl.where((first | second | third) % 16 == 0, length // BLOCK * BLOCK, 0)
    p0, p1, p2, p3 = walk(
        first, second, third, offset, whole * 0, whole, c, VERB, COUNT, A, B, C, T, BLOCK, True
    )
    q0, q1, q2, q3 = walk(
        first, second, third, offset, whole, length, c, VERB, COUNT, A, B, C, T, TAIL, False
    )
    if COUNT == 1:
        tl.store(partials + chunk * 4, tl.maximum(p0, q0).to(tl.float64, bitcast=True))
    if COUNT > 1:
        tl.store(partials + chunk * 4, p0 + q0)
        tl.store(partials + chunk * 4 + 1, p1 + q1)
    if COUNT > 2:
        tl.store(partials + chunk * 4 + 2, p2 + q2)
        tl.store(partials + chunk * 4 + 3, p3 + q3)


def step_along(part: Any, x: Stream, w: Stream, d: Stream, c: Tensor) -> None:
    """x = round(w − c·d)."""
    _launch(part, "step_along", x, w, d, numbers=c)


def axpby(part: Any, s: Stream, x: Stream, a: float, c: float) -> None:
    """s = a·s + c·x; where a = 0 s is not read."""
    _launch(part, "axpby" if a else "put", s, x, numbers=_sent(part, [a, c]))


def difference_dots(part: Any, s: Stream, a: Stream, b: Stream) -> Tensor:
    """s' = a − b; returns s'·s and s'·s', and s takes s'."""
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
    verb: str,
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
    # An absent stream has address 0 and no use of its dtype.
    a, b, c = (types[width] for width in (*STREAMS[verb], WIDE, WIDE)[:3])
    with on(part.device):
        verb_kernel[(len(part.handle),)](
            streams=_to_device(part.addresses(streams), part.device),
            chunks=part.handle,
            partials=part.partials,
            numbers=numbers,
            peaks=peaks,
            VERB=verb,
            COUNT=PARTIALS.get(verb, 0),
            A=a,
            B=b,
            C=c,
            T=types[WIDE],
            **sizes(dtype),
            **OPTIONS,
        )


def _sent(part: Any, numbers: Any) -> Tensor:
    # In a tensor, since Triton would take a Python number for a float32.
    return _to_device(torch.tensor(numbers, dtype=torch.float64), part.device)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    # Without waiting: torch hands pinned memory out again only when the copy from it is done, and
    # the device's own only to what runs on the same stream later.
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)
