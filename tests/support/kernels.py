"""The backends that are held against the reference: where each runs, and how close it must come.

Triton runs on a GPU, or in its interpreter, which TRITON_INTERPRET=1 selects for a whole process.
"""

import os
from typing import Any, NamedTuple

import pytest
import torch

from mechanic_fused import backends
from mechanic_fused.backends import layout

from .cases import SIZES, STEPS, SUM_RTOL, skip_unless_available

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

GPU_ONLY = pytest.param("cuda", marks=pytest.mark.gpu)
TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.triton,
        # The interpreter's numpy warns where it makes a NaN.
        pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    ],
)
KERNELS = ("cpp", GPU_ONLY, TRITON)
READ_ON_DEVICE = (GPU_ONLY, TRITON)
"""Those that read a step's numbers on the device."""

FLOAT_SUM_RTOL = 8 * 2.0**-24
"""Up to eight float products are added in float before they are added in double."""

ROOT_RTOL = STEPS * 2.0**-52
"""torch's float64 square root is not always the nearest number, so each u may be an ulp off."""

POWER_RTOL = STEPS * 2.0**-53 / (1 - 0.999)
"""A power by repeated squaring errs by 2⁻⁵³/(1 − β) relative to 1 − βᵗ, beside the libraries' pow:
a coefficient in float32 hides it, one in float64 shows it in each of up to STEPS updates."""

INTERPRETED_THREADS = 256
"""The interpreter takes milliseconds a block, whatever its size: fewer and larger ones."""


class Kernels(NamedTuple):
    """A backend and the conditions of its tests.

    Args:
        name: the backend's.
        ops: its module.
        device: the type of the device on which it runs here.
        sizes: of weights: empty, of one tail, of blocks and a tail, of several chunks.
        chunk: elements of a chunk, a few in the largest weight.
        adam64_rtol: how far float64 Adam may be off; all else agrees to the bit.
        float_sums: whether sums of float32 products begin in float32.
    """

    name: str
    ops: Any
    device: str
    sizes: tuple[int, ...] = SIZES
    chunk: int = 1 << 14
    adam64_rtol: float = POWER_RTOL
    float_sums: bool = False

    @property
    def reads_on_device(self):
        return self.name in ("cuda", "triton")

    def sum_rtol(self, dtype):
        in_float = self.float_sums and layout.compute_dtype(dtype) is torch.float32
        return FLOAT_SUM_RTOL if in_float else SUM_RTOL

    def set_chunk(self, monkeypatch, chunk):
        monkeypatch.setitem(self.ops.CHUNK, self.device, chunk)


def kernels_of(name, monkeypatch):
    """Return the Kernels of a backend; skips the test where it does not run."""
    device = "cpu" if name in ("reference", "cpp") or INTERPRETED else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU" + " (TRITON_INTERPRET=1 needs none)" * (name == "triton"))
    if name == "cuda" and INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is for Triton alone")
    skip_unless_available(name)
    found = Kernels(name, backends.load(name), device)
    if name == "cpp":
        found = found._replace(adam64_rtol=ROOT_RTOL, float_sums=True)
    elif name == "cuda":
        found = found._replace(chunk=layout.GPU_CHUNK)
    elif name == "triton" and INTERPRETED:
        # Whole blocks have 1,024 float32 elements or 2,048 of 16 bits.
        found = found._replace(sizes=(0, 3, 1025, 6200), chunk=1 << 12)
        _speed_up_interpreter(monkeypatch)
    found.set_chunk(monkeypatch, found.chunk)
    return found


def gpu_kernels(name, monkeypatch):
    """Return the Kernels of a backend on a GPU; skips the test where it does not run on one."""
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is for a CPU")
    return kernels_of(name, monkeypatch)


def _speed_up_interpreter(monkeypatch):
    from mechanic_fused.triton_kernels import storage

    monkeypatch.setattr(storage, "THREADS", INTERPRETED_THREADS)
    interpreted = type(storage.read)
    prepare_and_call = interpreted.__call__

    def call(self, *args, **kwargs):
        # The interpreter prepares the whole language anew for each call of a function, which for
        # one of ours the kernel has done: half of the time of these tests.
        if self.fn.__module__.startswith("triton."):
            return prepare_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreted, "__call__", call)
