"""The bounds that compiled kernels must keep, and the row of the table that says how they do."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mechanic_fused.backends.layout import KINDS, STATES, compute_dtype

from .machine_code import Code

ARCHITECTURES = (80, 90, 100)
MAIN = (torch.float32, torch.bfloat16)
DTYPES = (*MAIN, torch.float16, torch.float64)
NARROW = (torch.bfloat16, torch.float16)
"""The dtypes in which an option keeps the base's state, too."""

STEPS = tuple(f"{kind} step" for kind in KINDS)
"""The running form's kernel for each kind; a kind alone is its accumulate."""

IN_PART = " in part"
"""What the name of a step ends with whose weights may keep x_ref in part: a kernel of its own."""

KERNELS = (*KINDS, "apply", "measure", "norm", *STEPS, *(step + IN_PART for step in STEPS))
"""Those that walk over chunks."""

TUNERS = ("tune", "log_tune")
"""Those that do not."""

WITH_DELTA = (*KINDS, "apply", "measure")

JUDGED = {"triton": MAIN, "cuda": DTYPES}
"""The dtypes whose kernels must keep the bounds. CUDA's keep them in all."""

# Registers of an SM, and the most threads that it holds, are the same on these architectures.
SM_REGISTERS = 65536
SM_THREADS = 2048
SM_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}

IN_FLIGHT = 24 * 1024
"""Bytes that the loads of an SM's threads must cover at once: an H200's 4.8 TB/s over 132 SMs for
the 0.65 µs that a load takes."""


class Row(NamedTuple):
    """A kernel compiled for a dtype and an architecture."""

    backend: str
    kernel: str
    dtype: str
    state: str  # dtype of the base's state, or "" where the kernel has none
    delta: str  # dtype of Δ, "" where the kernel has none; CUDA's read a wide or a narrow one
    architecture: int
    registers: int
    stack: int  # bytes of spills and local arrays a thread
    local: int
    shared: int  # bytes a block; from sm_90 on the system takes 1024 of them
    loads: int  # 128-bit ones; the rest serve scalars and the ends of chunks
    stores: int
    threads: int  # resident on an SM, as far as registers and shared memory allow
    occupancy: float  # these threads as a part of the most that an SM holds
    in_flight: int  # bytes that these threads load at once
    broken: list[str]


def kind_of(kernel: str) -> str:
    """Return the update that a kernel makes, or "" where it makes none."""
    kind = kernel.removesuffix(IN_PART).removesuffix(" step")
    return kind if kind in KINDS else ""


class Traffic(NamedTuple):
    """Bytes of a block that a thread must load and store, in accesses of 16 bytes."""

    loads: int
    stores: int


def delta_dtype(dtype: torch.dtype, narrow: bool) -> torch.dtype:
    """Return the dtype of Δ beside weights of a dtype."""
    wide = compute_dtype(dtype)
    return torch.bfloat16 if narrow and wide is torch.float32 else wide


def variants(kernel: str, dtype: torch.dtype) -> tuple[bool, ...]:
    """Return whether a kernel's state may be wide, narrow, or both."""
    return (False, True) if STATES.get(kind_of(kernel)) and dtype in NARROW else (False,)


def traffic(
    kernel: str, dtype: torch.dtype, narrow: bool = False, narrow_delta: bool = False
) -> Traffic:
    """Return what a kernel moves for the elements in 16 bytes of weights.

    A narrow Δ beside float32 weights is not counted: its accesses are of 8 bytes, see ``halves``.
    """
    share = 16 // dtype.itemsize
    full = share * compute_dtype(dtype).itemsize // 16
    delta = share * delta_dtype(dtype, narrow_delta).itemsize // 16
    if kernel in KINDS:
        each = 1 if narrow else full
        moved = delta + each * len(STATES[kernel])
        return Traffic(2 + moved, moved)  # g, x, Δ and the states
    if kernel.removesuffix(IN_PART) in STEPS:
        states = (1 if narrow else full) * len(STATES[kind_of(kernel)])
        x = 2 if dtype in NARROW else 1  # with its low bits
        return Traffic(2 + x + states, x + states)  # g, x_ref, x and the states
    if kernel == "apply":
        return Traffic(1 + delta, 1)
    if kernel == "measure":
        return Traffic(1 + delta, 0)
    if kernel == "norm":
        return Traffic(1, 0)
    return Traffic(0, 0)


def halves(kernel: str, dtype: torch.dtype, narrow_delta: bool) -> int:
    """Return how many loads of 8 bytes a thread adds to those of 16."""
    return int(narrow_delta and kernel in WITH_DELTA and dtype is torch.float32)


def most_registers(
    backend: str, kernel: str, dtype: torch.dtype, narrow_delta: bool = False
) -> int:
    """Return how many registers a thread may take.

    A 16-bit block gives each thread of Triton 8 elements, not 4. Beside float32 weights a narrow Δ
    may take 112 for 104, and an x_ref in part 120, which leave an SM the same four programs; beside
    bfloat16 ones an x_ref in part may take 168 for 160, the same three programs. In CUDA it is what
    leaves room for the blocks that accumulate.cuh and step.cuh count on, and in the other kernels
    for a thousand threads; of log_tune there is only one block.
    """
    if backend == "triton":
        if kernel.endswith(IN_PART):
            return {torch.float32: 120, torch.bfloat16: 168}[dtype]
        return {torch.float32: 112 if narrow_delta else 104, torch.bfloat16: 160}[dtype]
    if kind := kind_of(kernel):
        in_part = kernel.endswith(IN_PART)
        blocks = (3 if kind == "adam" else 4) + (dtype is torch.float32) - in_part
        blocks = 2 if in_part and dtype in NARROW else blocks
        return SM_REGISTERS // (blocks * 256) // 8 * 8
    return 255 if kernel == "log_tune" else 64


def checked(
    backend: str,
    kernel: str,
    dtype: torch.dtype,
    architecture: int,
    code: Code,
    block_threads: int,
    narrow: bool = False,
    narrow_delta: bool = False,
) -> Row:
    """Return a kernel's row with the bounds that it breaks, if its dtype is JUDGED."""
    # A warp's registers are handed out by 256, eight a thread.
    blocks = SM_REGISTERS // ((code.registers + 7) // 8 * 8 * block_threads)
    blocks = min(blocks, SM_SHARED[architecture] // max(code.shared, 1))
    threads = min(blocks * block_threads, SM_THREADS)
    wanted = traffic(kernel, dtype, narrow, narrow_delta)
    # Without weight decay accumulate leaves x alone.
    loaded = 16 * (wanted.loads - (kernel in KINDS)) + 8 * halves(kernel, dtype, narrow_delta)
    in_flight = threads * loaded
    broken = []
    if dtype in JUDGED[backend]:
        most = most_registers(backend, kernel, dtype, narrow_delta)
        if code.stack or code.local or code.local_accesses:
            broken.append("spills or local memory")
        if code.registers > most:
            broken.append(f"more than {most} registers")
        if code.loads < wanted.loads or code.stores < wanted.stores:
            broken.append(f"fewer than {wanted.loads} + {wanted.stores} accesses of 128 bits")
        # A tuner works on a few hundred numbers.
        if in_flight < IN_FLIGHT and kernel not in TUNERS:
            broken.append(f"less than {IN_FLIGHT} bytes in flight")
    state = "" if not STATES.get(kind_of(kernel)) else dtype if narrow else compute_dtype(dtype)
    delta = delta_dtype(dtype, narrow_delta) if kernel in WITH_DELTA else ""
    return Row(
        backend,
        kernel,
        str(dtype).removeprefix("torch."),
        str(state).removeprefix("torch."),
        str(delta).removeprefix("torch."),
        architecture,
        code.registers,
        code.stack,
        code.local,
        code.shared,
        code.loads,
        code.stores,
        threads,
        threads / SM_THREADS,
        in_flight,
        broken,
    )
