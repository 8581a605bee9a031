"""The bounds that compiled kernels must keep, and the row of the table that says how they do."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mechanic_fused.backends.layout import KINDS, MUON, STATES, compute_dtype

from .machine_code import Code

ARCHITECTURES = (80, 90, 100)
MAIN = (torch.float32, torch.bfloat16)
DTYPES = (*MAIN, torch.float16, torch.float64)
NARROW = (torch.bfloat16, torch.float16)
"""The dtypes of weights of 16 bits."""

STEPS = tuple(f"{kind} step" for kind in KINDS)
"""The running form's kernel for each kind; a kind alone is its accumulate."""

IN_PART = " in part"
"""What the name of a step ends with whose weights may keep x_ref in part: a kernel of its own."""

MOMENTUM, UPDATE = f"{MUON} momentum", f"{MUON} update"
"""The two ends of a step of Muon."""

KERNELS = (
    *(*KINDS, "apply", "measure", "norm", *STEPS, *(step + IN_PART for step in STEPS)),
    *(MOMENTUM, MOMENTUM + IN_PART, UPDATE),
)
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
    """Return the update whose state a kernel moves, or "" where it moves none."""
    name = kernel.removesuffix(IN_PART)
    kind = MUON if name == MOMENTUM else name.removesuffix(" step")
    return kind if kind in STATES else ""


class Traffic(NamedTuple):
    """Bytes of a block that a thread must load and store, in accesses of 16 bytes."""

    loads: int
    stores: int


def delta_dtype(dtype: torch.dtype, narrow: bool) -> torch.dtype:
    """Return the dtype of Δ beside weights of a dtype."""
    wide = compute_dtype(dtype)
    return torch.bfloat16 if narrow and wide is torch.float32 else wide


def variants(kernel: str, dtype: torch.dtype) -> list[torch.dtype | None]:
    """Return the dtypes of a kernel's state: None for the arithmetic's, int8 for codes.

    Of apply and measure it says whether Δ has codes.
    """
    if kernel in ("apply", "measure") and dtype is not torch.float64:
        return [None, torch.int8]
    if not STATES.get(kind_of(kernel)) or dtype is torch.float64:
        return [None]
    return [None, torch.bfloat16, torch.int8, *[dtype] * (dtype is torch.float16)]


def traffic(
    kernel: str,
    dtype: torch.dtype,
    state: torch.dtype | None = None,
    narrow_delta: bool = False,
) -> Traffic:
    """Return what a kernel moves for the elements in 16 bytes of weights.

    What is narrower than the weights is not counted: its accesses have fewer bytes, see
    ``smaller``. Beside codes Δ is narrow as well.
    """
    share = 16 // dtype.itemsize
    narrow_delta = narrow_delta or state is torch.int8
    delta = share * delta_dtype(dtype, narrow_delta).itemsize // 16
    each = share * (state or compute_dtype(dtype)).itemsize // 16
    states = each * len(STATES.get(kind_of(kernel), ()))
    if kernel in KINDS:
        return Traffic(2 + delta + states, delta + states)  # g, x, Δ and the states
    if kernel.removesuffix(IN_PART) in STEPS:
        x = 2 if dtype in NARROW else 1  # with its low bits
        return Traffic(2 + x + states, x + states)  # g, x_ref, x and the states
    direction = share * compute_dtype(dtype).itemsize // 16  # n or O, in its wider dtype
    if kernel.removesuffix(IN_PART) == MOMENTUM:
        x = 2 if dtype in NARROW else 1
        return Traffic(2 + x + states, direction + states)  # g, x_ref, x and the momentum
    if kernel == UPDATE:
        x = 2 if dtype in NARROW else 1
        return Traffic(direction + x, x)
    if kernel == "apply":
        return Traffic(1 + delta, 1)
    if kernel == "measure":
        return Traffic(1 + delta, 0)
    if kernel == "norm":
        return Traffic(1, 0)
    return Traffic(0, 0)


def smaller(kernel: str, dtype: torch.dtype, state: torch.dtype | None, narrow_delta: bool) -> int:
    """Return the bytes that a thread loads in accesses of fewer than 16."""
    share = 16 // dtype.itemsize
    narrow_delta = narrow_delta or state is torch.int8
    delta = share * delta_dtype(dtype, narrow_delta).itemsize % 16 if kernel in WITH_DELTA else 0
    each = share * (state or compute_dtype(dtype)).itemsize % 16
    return delta + each * len(STATES.get(kind_of(kernel), ()))


def rounds(kernel: str, state: torch.dtype | None) -> bool:
    """Return whether a kernel rounds its state by bits of its own: codes, and v in bfloat16."""
    kind = kind_of(kernel)
    return bool(STATES.get(kind)) and (
        state is torch.int8 or (state is torch.bfloat16 and kind == "adam")
    )


def most_registers(
    backend: str,
    kernel: str,
    dtype: torch.dtype,
    state: torch.dtype | None = None,
    narrow_delta: bool = False,
) -> int:
    """Return how many registers a thread may take.

    A 16-bit block gives each thread of Triton 8 elements, not 4. Beside float32 weights a narrow Δ
    may take 112 for 104, and an x_ref in part 120, which leave an SM the same four programs; beside
    bfloat16 ones an x_ref in part may take 168 for 160, the same three programs. A state that is
    rounded by bits of its own may take what leaves three programs, and two beside bfloat16. In CUDA
    it is what leaves room for the blocks that accumulate.cuh, step.cuh and muon.cu count on, and in
    the other kernels for a thousand threads; of log_tune there is only one block.
    """
    in_part = kernel.endswith(IN_PART)
    if backend == "triton":
        if rounds(kernel, state):
            return {torch.float32: 168, torch.bfloat16: 255}[dtype]
        if in_part:
            return {torch.float32: 120, torch.bfloat16: 168}[dtype]
        return {torch.float32: 112 if narrow_delta else 104, torch.bfloat16: 160}[dtype]
    if kind := kind_of(kernel):
        is_step = kernel.removesuffix(IN_PART) in (*STEPS, MOMENTUM)
        blocks = (3 if kind == "adam" else 4) + (dtype is torch.float32) - in_part
        blocks -= rounds(kernel, state)
        has_codes = state is torch.int8 and rounds(kernel, state)
        blocks = 2 if is_step and (in_part or has_codes) and dtype in NARROW else blocks
        blocks -= kernel == MOMENTUM and state is None
        return SM_REGISTERS // (blocks * 256) // 8 * 8
    return 255 if kernel == "log_tune" else 64


def checked(
    backend: str,
    kernel: str,
    dtype: torch.dtype,
    architecture: int,
    code: Code,
    block_threads: int,
    state: torch.dtype | None = None,
    narrow_delta: bool = False,
) -> Row:
    """Return a kernel's row with the bounds that it breaks, if its dtype is JUDGED."""
    # A warp's registers are handed out by 256, eight a thread.
    blocks = SM_REGISTERS // ((code.registers + 7) // 8 * 8 * block_threads)
    blocks = min(blocks, SM_SHARED[architecture] // max(code.shared, 1))
    threads = min(blocks * block_threads, SM_THREADS)
    wanted = traffic(kernel, dtype, state, narrow_delta)
    # Without weight decay accumulate leaves x alone.
    loaded = 16 * (wanted.loads - (kernel in KINDS)) + smaller(kernel, dtype, state, narrow_delta)
    in_flight = threads * loaded
    broken = []
    # Of Triton's kernels of the exact forms beside such a state one spills 8 bytes, and one has too
    # few in flight; CUDA's, which are the default, are judged.
    is_narrow = state is not None and state.itemsize < dtype.itemsize
    exempt = backend == "triton" and kernel in KINDS and is_narrow
    if dtype in JUDGED[backend] and not exempt:
        most = most_registers(backend, kernel, dtype, state, narrow_delta)
        if code.stack or code.local or code.local_accesses:
            broken.append("spills or local memory")
        if code.registers > most:
            broken.append(f"more than {most} registers")
        if code.loads < wanted.loads or code.stores < wanted.stores:
            broken.append(f"fewer than {wanted.loads} + {wanted.stores} accesses of 128 bits")
        # A tuner works on a few hundred numbers. Of codes Triton's kernels have too few bytes in
        # flight, since their registers hold 32-bit numbers while layouts change: CUDA's have them.
        few_are_known = kernel in TUNERS or (backend == "triton" and state is torch.int8)
        if in_flight < IN_FLIGHT and not few_are_known:
            broken.append(f"less than {IN_FLIGHT} bytes in flight")
    has_state = bool(STATES.get(kind_of(kernel))) or state is torch.int8
    narrow_delta = narrow_delta or state is torch.int8
    delta = delta_dtype(dtype, narrow_delta) if kernel in WITH_DELTA else ""
    delta = torch.int16 if delta and state is torch.int8 else delta
    return Row(
        backend,
        kernel,
        str(dtype).removeprefix("torch."),
        str(state or compute_dtype(dtype)).removeprefix("torch.") if has_state else "",
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
