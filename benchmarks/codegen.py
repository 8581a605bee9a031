"""What the compilers made of the kernels: registers, spills, widths of access, occupancy.

    python -m benchmarks.codegen

Needs no GPU. Prints a table, writes it to benchmarks/results/codegen.json, and exits with 1 where a
bound is broken.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mechanic_fused.bases import KINDS, STATES
from mechanic_fused.bucket import wide

ARCHITECTURES = (80, 90, 100)
MAIN = (torch.float32, torch.bfloat16)
DTYPES = (*MAIN, torch.float16, torch.float64)

# Registers of an SM, and the most threads that it holds, are the same on these architectures.
SM_REGISTERS = 65536
SM_THREADS = 2048

REGISTERS = {torch.float32: 104, torch.bfloat16: 160}
"""The most registers a thread may take. A 16-bit block gives each thread 8 elements, not 4."""

IN_FLIGHT = 24 * 1024
"""Bytes that the loads of an SM's threads must cover at once: an H200's 4.8 TB/s over 132 SMs for
the 0.65 µs that a load takes."""


class Row(NamedTuple):
    """A kernel compiled for a dtype and an architecture."""

    backend: str
    kernel: str
    dtype: str
    architecture: int
    registers: int
    stack: int  # bytes of spills and local arrays a thread
    local: int
    loads: int  # 128-bit ones; the rest serve scalars and the ends of chunks
    stores: int
    threads: int  # resident on an SM, as far as registers allow
    in_flight: int  # bytes that these threads load at once
    broken: list[str]


class Traffic(NamedTuple):
    """Bytes of a block that a thread must load and store, in accesses of 16 bytes."""

    loads: int
    stores: int


def traffic(kernel: str, dtype: torch.dtype) -> Traffic:
    """Return what a kernel moves for the elements in 16 bytes of weights."""
    share = 16 // dtype.itemsize
    delta = share * wide(dtype).itemsize // 16  # also of each state
    if kernel in KINDS:
        states = len(STATES[kernel])
        return Traffic(2 + delta * (1 + states), delta * (1 + states))  # g, x, Δ and the states
    if kernel == "apply":
        return Traffic(1 + delta, 1)
    if kernel == "measure":
        return Traffic(1 + delta, 0)
    return Traffic(0, 0)


def triton_source(kernel: str, dtype: torch.dtype) -> Any:
    """Return a Triton kernel as its launcher specialises it."""
    from mechanic_fused.triton_kernels import storage
    from triton.compiler import ASTSource

    verb = "accumulate" if kernel in KINDS else "tune" if kernel == "tune" else "apply"
    module = importlib.import_module(f"mechanic_fused.triton_kernels.{verb}")
    function = getattr(module, f"{verb}_kernel")
    x, t = storage.DTYPES[dtype], storage.DTYPES[wide(dtype)]
    constants = {
        "accumulate": {"KIND": kernel, "X": x, "T": t, "S": t, **storage.sizes(dtype)},
        "apply": {"BETAS": 6, "X": x, "T": t, **storage.sizes(dtype)},
        "tune": {"BETAS": 6, "COLUMNS": 8, "ROWS": 32},
    }[verb] | {"grad_scale": None, "found_inf": None}
    if kernel == "measure":
        constants |= {"tuner": None, "BETAS": 0}
    types = {
        **dict.fromkeys(("tensors", "chunks", "spans"), "*i64"),
        **dict.fromkeys(("hyper", "partials", "sums", "tuner", "state", "constants"), "*fp64"),
        **{"tickets": "*i32", "chunk_count": "i32", "rows": "i32"},
    }
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    return ASTSource(
        fn=function,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in names},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*")
        },
    )


def triton_row(kernel: str, dtype: torch.dtype, architecture: int) -> Row:
    """Compile one Triton kernel and hold it against the bounds."""
    from mechanic_fused.triton_kernels import storage
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as triton_compile

    compiled = triton_compile(
        triton_source(kernel, dtype),
        target=GPUTarget("cuda", architecture, 32),
        options=storage.OPTIONS,
    )
    resources = resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    loads = len(re.findall(r"ld\.global\.(?:v4\.b32|v2\.b64)\b", ptx))
    stores = len(re.findall(r"st\.global\.(?:v4\.b32|v2\.b64)\b", ptx))
    return checked("triton", kernel, dtype, architecture, resources, loads, stores, storage.THREADS)


def checked(
    backend: str,
    kernel: str,
    dtype: torch.dtype,
    architecture: int,
    resources: dict[str, int],
    loads: int,
    stores: int,
    block_threads: int,
) -> Row:
    """Return a kernel's row with the bounds that it breaks: only kernels of MAIN can."""
    registers = resources["REG"]
    # A warp's registers are handed out by 256, eight a thread.
    blocks = SM_REGISTERS // ((registers + 7) // 8 * 8 * block_threads)
    threads = min(blocks * block_threads, SM_THREADS)
    wanted = traffic(kernel, dtype)
    # Without weight decay accumulate leaves x alone.
    in_flight = threads * 16 * (wanted.loads - (kernel in KINDS))
    broken = []
    if dtype in MAIN and kernel != "tune":
        if resources["STACK"] or resources["LOCAL"]:
            broken.append("spills or local memory")
        if registers > REGISTERS[dtype]:
            broken.append(f"more than {REGISTERS[dtype]} registers")
        if loads < wanted.loads or stores < wanted.stores:
            broken.append(f"fewer than {wanted.loads} + {wanted.stores} accesses of 128 bits")
        if in_flight < IN_FLIGHT:
            broken.append(f"less than {IN_FLIGHT} bytes in flight")
    return Row(
        backend,
        kernel,
        str(dtype).removeprefix("torch."),
        architecture,
        registers,
        resources["STACK"],
        resources["LOCAL"],
        loads,
        stores,
        threads,
        in_flight,
        broken,
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump says of the only kernel in a cubin: REG, STACK, LOCAL, SHARED …"""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", printed)}


def triton_rows(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Row]:
    """Compile every Triton kernel for every dtype and architecture."""
    for architecture in ARCHITECTURES:
        for dtype in dtypes:
            for kernel in (*KINDS, "apply", "measure"):
                yield triton_row(kernel, dtype, architecture)
        yield triton_row("tune", torch.float64, architecture)


# The CUDA backend's rows come here: `cuda_rows`, from cuobjdump -res-usage and -sass of the
# extension, through `checked("cuda", …)`.
SOURCES = {"triton": triton_rows}


def line(row: Row) -> str:
    return (
        f"{row.backend:8}{row.kernel:11}{row.dtype:10}sm_{row.architecture:<5}{row.registers:>9}"
        f"{row.stack:>7}{row.local:>7}{row.loads:>6}{row.stores:>6}{row.threads:>9}"
        f"{row.in_flight // 1024:>8} KiB  {'; '.join(row.broken)}"
    )


def main() -> int:
    from benchmarks import records

    print(
        "backend kernel     dtype     arch    registers  stack  local   ld128 st128 threads/SM"
        " in flight/SM"
    )
    rows = []
    for source in SOURCES.values():
        for row in source():
            print(line(row), flush=True)
            rows.append(row)
    record = {"conditions": records.conditions(), "rows": [row._asdict() for row in rows]}
    records.write(records.RESULTS / "codegen.json", record)
    return int(any(row.broken for row in rows))


if __name__ == "__main__":
    sys.exit(main())
