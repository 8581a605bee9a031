"""The CUDA kernels as they stand in the compiled module, for each architecture that it has."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from mechanic_fused.backends.layout import compute_dtype

from . import machine_code
from .bounds import ARCHITECTURES, IN_PART, MOMENTUM, UPDATE, Row, checked

THREADS = 256
"""Of a block, in every kernel: kThreads of launch.cuh."""

NUMBERS = {
    **{"f": torch.float32, "d": torch.float64, "BFloat16": torch.bfloat16, "Half": torch.half},
    "Code": torch.int8,
}

# Mangled names: f and d are float and double; a later S3_ repeats the type that was named before.
NUMBER = r"(?:NS_\d+)?(f|d|BFloat16|Half)E?"
STORED = r"(S\w*_|(?:NS\d*_\d+)?(?:f|d|BFloat16|Half|Code))E"
BASE = re.compile(rf"(accumulate|step)_kernelI(?:Lb([01])E)?NS_\d+([A-Z][a-z]+)E{NUMBER}{STORED}")
MOMENTUM_OF_MUON = re.compile(rf"momentum_kernelILb([01])E{NUMBER}{STORED}")
UPDATE_OF_MUON = re.compile(rf"update_kernelI{NUMBER}E")
NORM = re.compile(rf"norm_kernelI{NUMBER}E")
TUNER = re.compile(r"\d((?:log_)?tune)_kernelE")
APPLY = re.compile(rf"apply_kernelILb([01])E{NUMBER}{STORED}")


class Kernel(NamedTuple):
    """Which kernel a function of the module is."""

    name: str
    dtype: torch.dtype
    state: torch.dtype | None  # None: the arithmetic's; int8: codes, of Δ too


def kernel_of(function: str) -> Kernel | None:
    """Return which kernel a mangled name means, or None for a function that is none of ours."""
    if found := BASE.search(function):
        op, in_part, base, weight, state = found.groups()
        name = base.lower() + " step" * (op == "step") + IN_PART * (in_part == "1")
        return Kernel(name, NUMBERS[weight], _state(NUMBERS[weight], state))
    if found := MOMENTUM_OF_MUON.search(function):
        in_part, weight, state = found.groups()
        name = MOMENTUM + IN_PART * (in_part == "1")
        return Kernel(name, NUMBERS[weight], _state(NUMBERS[weight], state))
    if found := UPDATE_OF_MUON.search(function):
        return Kernel(UPDATE, NUMBERS[found[1]], None)
    if found := APPLY.search(function):
        name = "apply" if found[1] == "1" else "measure"
        return Kernel(name, NUMBERS[found[2]], torch.int8 if "Code" in found[3] else None)
    if found := NORM.search(function):
        return Kernel("norm", NUMBERS[found[1]], None)
    if found := TUNER.search(function):
        return Kernel(found[1], torch.float64, None)
    return None


def _state(dtype: torch.dtype, mangled: str) -> torch.dtype | None:
    """Return the dtype of a state beside weights of a dtype, None for the arithmetic's."""
    stored = dtype if mangled.startswith("S") else NUMBERS[re.sub(r"^NS\d*_\d+", "", mangled)]
    return None if stored is compute_dtype(dtype) else stored


def absent() -> str:
    """Return why there is nothing to look at here, or the empty string."""
    try:
        native = importlib.import_module("mechanic_fused._native")
    except ImportError as error:
        return f"the extension was not built ({error})"
    if not native.has_cuda:
        return "the extension was built without CUDA"
    return "" if machine_code.cuobjdump() else "cuobjdump is not installed"


def rows(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Row]:
    """Hold every kernel of the compiled module against the bounds."""
    module = importlib.import_module("mechanic_fused._native")
    for architecture in architectures:
        for function, code in machine_code.read(Path(module.__file__), architecture).items():
            if kernel := kernel_of(function):
                name, dtype, state = kernel
                yield checked("cuda", name, dtype, architecture, code, THREADS, state)
