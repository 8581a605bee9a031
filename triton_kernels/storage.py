"""How numbers lie in memory, and how kernels start."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

WARPS = 4
THREADS = 32 * WARPS

# Without it a·b + c may be rounded once or twice, as the compiler likes; reference.py rounds twice.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# The columns of a row of the tensor table (bucket.TENSOR) and of the hyperparameters (bases.HYPER).
GRADIENT, WEIGHT, X_REF, DELTA, STATE0, STATE1, STEP, SCALE, GROUP, NUMBER, TENSOR_COLUMNS = (
    tl.constexpr(i) for i in range(11)
)
CHUNK_COLUMNS = tl.constexpr(3)


def sizes(dtype: torch.dtype) -> dict[str, int]:
    """Elements of a block where weights have ``dtype``: 128 bits a thread, the widest access.

    More would cost registers, and so the other programs whose loads hide the latency of ours. In
    the TAIL of a chunk it is an element a thread.
    """
    return {"BLOCK": THREADS * 16 // dtype.itemsize, "TAIL": THREADS}


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def at(address, offset, dtype: tl.constexpr):
    """The pointer to element ``offset``, int64, of the array at an address."""
    return address.to(tl.pointer_type(dtype)) + offset


@triton.jit
def aligned_at(address, offset, dtype: tl.constexpr):
    """The same for an address and an offset in bytes that are multiples of 16: loads get wide."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)) + offset, 16)


@triton.jit
def read(pointers, mask):
    """Load; 0 where the mask (or None) is false."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x in dtype, the dtype of the arithmetic: exact."""
    if x.dtype == tl.bfloat16:
        # By integers, since the interpreter garbles the smallest numbers.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round x to the nearest number of dtype, to even between two."""
    if dtype == tl.bfloat16:
        # By integers, since the interpreter would truncate.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding up could turn a NaN into an infinity or a zero.
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        high = tl.where(is_nan, (bits >> 16) | 0x7FC0, rounded)
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def stochastic_round(bits, x):
    """float32 x in bfloat16: up in magnitude as often as what is cut off is of a last place.

    ``bits`` are 16 random ones, uint32; x is the result of an operation, so its NaNs are quiet
    ones, which cutting leaves NaN and adding might not.
    """
    bits = tl.where(x == x, bits, 0)
    high = (x.to(tl.uint32, bitcast=True) + bits) >> 16
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
