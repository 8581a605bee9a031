"""How numbers are loaded and stored, and how kernels are launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

WARPS = 4
THREADS = 32 * WARPS

# With fusion the compiler would choose whether a·b + c is rounded once or twice; everywhere else it
# is rounded twice.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

STORED_DTYPES = {**DTYPES, torch.int8: tl.int8, torch.int16: tl.int16}
"""Those of weights, and of codes: of the base's state and of Δ."""


def sizes(dtype: torch.dtype) -> dict[str, int]:
    """Return the elements of a block for weights of ``dtype``: 128 bits a thread, the widest load.

    More would take registers from the other programs, whose loads hide the latency of this one's.
    In the TAIL of a chunk a thread takes one element.
    """
    return {"BLOCK": THREADS * 16 // dtype.itemsize, "TAIL": THREADS}


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def array(address, dtype: tl.constexpr):
    """An address from a table, int64, as a pointer to numbers of dtype."""
    return address.to(tl.pointer_type(dtype))


@triton.jit
def at(base, offset, i, limit):
    """Pointers to the elements i of a chunk that begins at element ``offset``, int64, of an array.

    ``limit`` is None in whole blocks (see ``chunk_loop``): there the address of the array and the
    offset in bytes are multiples of 16, so that loads become 128 bits wide.
    """
    first = base + offset
    if limit is None:
        first = tl.multiple_of(first, 16)
    return first + i


@triton.jit
def read(pointers, mask):
    """Load; 0 where the mask is false. Without a mask, None, load everything."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x converted to dtype, the dtype of arithmetic, which is exact."""
    if x.dtype == tl.bfloat16:
        # In integers, since the interpreter converts subnormal numbers wrongly.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x rounded to dtype, to nearest, ties to even."""
    if dtype == tl.bfloat16:
        # In integers, since the interpreter would truncate.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding up could turn a NaN into an infinity or a zero.
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        high = tl.where(is_nan, (bits >> 16) | 0x7FC0, rounded)
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
