"""The tables that plans write and kernels read: columns, enumerations and dtypes.

``csrc/chunk.h`` and ``triton_kernels/layout.py`` declare the same layout for C++, CUDA and Triton;
``tests/backends/test_layout.py`` compares the three. No other file names a column by its number.
"""

from __future__ import annotations

import torch

TENSOR = (
    *("gradient", "weight", "x_ref", "delta", "state0", "state1", "step"),
    *("scale", "group", "number"),
)
"""Columns of a row of the tensor table, int64: seven addresses (0: absent), the weight's row of
the sums, its row of the hyperparameters, and its number in the optimizer."""

CHUNK = ("tensor", "offset", "length")
"""Columns of a row of the chunk table, int64: elements [offset, offset + length) of a tensor."""

SPAN = ("first_chunk", "chunks", "first_tensor", "tensors")
"""Columns of a row of the span table, int64, one row per scale."""

HYPER = ("lr", "beta1", "beta2", "eps", "l2", "decay", "nesterov", "gradient")
"""Columns of a row of hyperparameters, float64. SGD's momentum and dampening are stored as beta1
and beta2; ``l2`` is added to the gradient, ``decay`` is decoupled; ``gradient`` multiplies every
gradient: ±1 / GradScaler's scale."""

SUMS = ("gd", "xd", "gg", "xx")
"""Columns of a row of the sums, float64: g·Δ, x·Δ, g·g, x·x."""

GD, XD, GG, XX = range(len(SUMS))

TUNER = ("s", "r", "v", "m")
"""Blocks of a row of the tuner's state, float64, one number per tuner beta; then COUNTERS."""

COUNTERS = ("steps", "nonfinite")
"""The last columns of a row of the tuner's state; only the first row's ``nonfinite`` is used."""

CONSTANTS = (
    *("decay", "s_init", "eps", "eps_in_m", "clamps_h", "floors_r"),
    *("tunes_scale", "annealing_factor"),
)
"""The tuner's constants, float64; the tuner betas follow them."""

KINDS = ("sgd", "momentum", "adam", "lion")
"""The fused updates; kernels know each by its index here."""

STATES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
}
"""Update → the names of its state tensors, in the order state0, state1."""

STEPPED = ("momentum", "adam")
"""The updates that count a weight's steps: Adam's bias corrections, SGD's first momentum."""

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of weights that kernels support; kernels know each by its index here."""

CPU_CHUNK = 1 << 17
"""Elements of a chunk on a CPU: small enough that threads share a model evenly, large enough that
starting to read its streams costs little."""

GPU_CHUNK = 1 << 13
"""Elements of a chunk on a GPU, one block's work: short enough that the last blocks of a launch end
together, long enough (8 rounds of 16-byte loads) that starting one costs little."""


def tuner_width(betas: int) -> int:
    """Return the number of columns of the tuner's state for this number of tuner betas."""
    return len(TUNER) * betas + len(COUNTERS)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for weights of a dtype, C++'s ``opmath_t``."""
    return torch.float64 if dtype is torch.float64 else torch.float32
