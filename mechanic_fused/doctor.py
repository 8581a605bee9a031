"""python -m mechanic_fused doctor: what is missing here, and how to get it."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from . import backends


class Finding(NamedTuple):
    """Something that a step can use.

    Args:
        name: of it.
        remedy: how to get it, or the empty string where it is there.
    """

    name: str
    remedy: str


def findings() -> list[Finding]:
    """Return what steps can use on this machine, with what to do where it is missing."""
    missing = {row.name: row.why for row in backends.table()}
    has_gpu = torch.cuda.is_available()
    found = [Finding("the C++ kernels", missing["cpp"])]
    if has_gpu:
        found.append(Finding("the CUDA kernels", missing["cuda"]))
        found.append(Finding("the Triton kernels", missing["triton"]))
    elif torch.version.cuda:
        found.append(
            Finding("a GPU", "torch has CUDA but sees no GPU: check the driver and nvidia-smi")
        )
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS")
    slow = f"torch has {threads} of {cores}: " + (
        f"OMP_NUM_THREADS is {asked}, as torchrun sets it; set it, or call torch.set_num_threads"
        if asked
        else "call torch.set_num_threads"
    )
    found.append(Finding("all cores", slow if threads == 1 < cores and not has_gpu else ""))
    has_pictures = importlib.util.find_spec("matplotlib") is not None
    found.append(Finding("pictures by plot()", "" if has_pictures else "pip install matplotlib"))
    return found


def report() -> str:
    """Return a line for each finding."""
    return "\n".join(
        f"{'missing' if remedy else 'ok':<9}{name}{f': {remedy}' if remedy else ''}"
        for name, remedy in findings()
    )
