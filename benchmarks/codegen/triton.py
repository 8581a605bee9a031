"""The Triton kernels as their launchers specialise them, compiled for each architecture."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mechanic_fused.backends.layout import KINDS, MUON, compute_dtype

from . import machine_code
from .bounds import (
    ARCHITECTURES,
    DTYPES,
    IN_PART,
    KERNELS,
    MOMENTUM,
    STEPS,
    TUNERS,
    UPDATE,
    WITH_DELTA,
    Row,
    checked,
    delta_dtype,
    kind_of,
    rounds,
    variants,
)


def with_narrow_delta(dtype: torch.dtype, state: torch.dtype | None) -> bool:
    """Return whether Δ is always narrow beside a state that is narrower than the weights."""
    return state is torch.int8 or (state is torch.bfloat16 and dtype is not torch.bfloat16)


def source(
    kernel: str,
    dtype: torch.dtype,
    state: torch.dtype | None = None,
    narrow_delta: bool = False,
) -> Any:
    """Return a Triton kernel as its launcher specialises it.

    Args:
        state: the dtype of the base's state: None for the arithmetic's, int8 for codes.
        narrow_delta: Δ is in bfloat16; beside codes it is in int16.
    """
    from mechanic_fused.triton_kernels import storage
    from triton.compiler import ASTSource

    ops = {"measure": "apply", **dict.fromkeys(KINDS, "accumulate"), **dict.fromkeys(STEPS, "step")}
    ops |= {MOMENTUM: "momentum", UPDATE: "update"}
    op = ops.get(kernel.removesuffix(IN_PART), kernel)
    file = MUON if op in ("momentum", "update") else op
    module = importlib.import_module(f"mechanic_fused.triton_kernels.{file}")
    function = getattr(module, f"{op}_kernel")
    x, t = storage.DTYPES[dtype], storage.DTYPES[compute_dtype(dtype)]
    narrow_delta = narrow_delta or with_narrow_delta(dtype, state)
    has_codes = state is torch.int8
    d = storage.STORED_DTYPES[torch.int16 if has_codes else delta_dtype(dtype, narrow_delta)]
    stored = {
        "S": t if state is None else storage.STORED_DTYPES[state],
        "STATE_BLOCK": 64 if has_codes else 0,
    }
    no_bits = {} if rounds(kernel, state) else {"step_count": None}
    constants = {
        "accumulate": {
            "KIND": kernel,
            "X": x,
            "T": t,
            "D": d,
            **stored,
            **({} if narrow_delta else no_bits),
            **storage.sizes(dtype),
        },
        "step": {
            "KIND": kind_of(kernel),
            "X": x,
            "T": t,
            **stored,
            **no_bits,
            "HAS_LOW": dtype.itemsize == 2,
            "IN_PART": kernel.endswith(IN_PART),
            **storage.sizes(dtype),
        },
        "momentum": {
            "X": x,
            "T": t,
            "N": t,
            **stored,
            **no_bits,
            "HAS_LOW": dtype.itemsize == 2,
            "IN_PART": kernel.endswith(IN_PART),
            **storage.sizes(dtype),
        },
        "update": {
            "X": x,
            "T": t,
            "N": t,
            "step_count": None,
            "HAS_LOW": dtype.itemsize == 2,
            **storage.sizes(dtype),
        },
        "apply": {
            "BETAS": 6,
            "X": x,
            "T": t,
            "D": d,
            "DELTA_BLOCK": 64 if has_codes else 0,
            **storage.sizes(dtype),
        },
        "norm": {"X": x, "T": t, **storage.sizes(dtype)},
        "tune": {"BETAS": 6, "COLUMNS": 8, "ROWS": 32},
        "log_tune": {"ROWS": 32},
    }[op] | {"grad_scale": None, "found_inf": None, "clip": None}
    if kernel == "measure":
        constants |= {"tuner": None, "BETAS": 0}
    doubles = ("hyper", "partials", "sums", "tuner", "state", "constants", "losses", "step_count")
    types = {
        **dict.fromkeys(("tensors", "chunks", "spans"), "*i64"),
        **dict.fromkeys(doubles, "*fp64"),
        **{"tickets": "*i32", "chunk_count": "i32", "rows": "i32"},
        **{"first": "i64", "size": "i32", "ratio": "fp32"},
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


def compiled(
    kernel: str,
    dtype: torch.dtype,
    architecture: int,
    state: torch.dtype | None = None,
    narrow_delta: bool = False,
) -> dict[str, Any]:
    """Return every stage of a kernel's compilation, from "ttir" to "cubin"."""
    from mechanic_fused.triton_kernels import storage
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as triton_compile

    target = GPUTarget("cuda", architecture, 32)
    found = source(kernel, dtype, state, narrow_delta)
    return triton_compile(found, target=target, options=storage.OPTIONS).asm


def row(
    kernel: str,
    dtype: torch.dtype,
    architecture: int,
    state: torch.dtype | None = None,
    narrow_delta: bool = False,
) -> Row:
    """Compile one kernel and hold it against the bounds."""
    from mechanic_fused.triton_kernels import storage

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(kernel, dtype, architecture, state, narrow_delta)["cubin"])
        file.flush()
        (code,) = machine_code.read(Path(file.name), architecture).values()
    threads = storage.THREADS
    narrow_delta = narrow_delta or with_narrow_delta(dtype, state)
    return checked("triton", kernel, dtype, architecture, code, threads, state, narrow_delta)


def rows(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Row]:
    """Compile every kernel for every dtype and architecture."""
    for architecture in ARCHITECTURES:
        for dtype in dtypes:
            for kernel in KERNELS:
                for state in variants(kernel, dtype):
                    yield row(kernel, dtype, architecture, state)
                if kernel in WITH_DELTA and dtype is not torch.float64:
                    yield row(kernel, dtype, architecture, narrow_delta=True)
        for kernel in TUNERS:
            yield row(kernel, torch.float64, architecture)
