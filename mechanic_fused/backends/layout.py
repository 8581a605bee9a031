"""The tables that plans write and kernels read: columns, enumerations and dtypes.

``csrc/chunk.h`` and ``triton_kernels/layout.py`` declare the same layout for C++, CUDA and Triton;
``tests/backends/test_layout.py`` compares the three. No other file names a column by its number.
"""

from __future__ import annotations

import torch

TENSOR = (
    *("gradient", "weight", "x_low", "x_ref", "delta", "state0", "state1", "step"),
    *("scales0", "scales1", "delta_scales", "scale", "group", "number", "phase", "element"),
)
"""Columns of a row of the tensor table, int64: eleven addresses (0: absent), the last three of the
scales of codes; the weight's row of the sums, its row of the hyperparameters, its number in
the optimizer, where its first element is among REFERENCE_PERIOD elements, of which the first
REFERENCE_BLOCK have an x_ref (−1: all), and the index of that element in the whole weight."""

CHUNK = ("tensor", "offset", "length")
"""Columns of a row of the chunk table, int64: elements [offset, offset + length) of a tensor."""

SPAN = ("first_chunk", "chunks", "first_tensor", "tensors")
"""Columns of a row of the span table, int64, one row per scale."""

HYPER = ("lr", "beta1", "beta2", "eps", "l2", "decay", "nesterov", "gradient", "peak_lr")
"""Columns of a row of hyperparameters, float64. SGD's momentum and dampening are stored as beta1
and beta2; ``l2`` is added to the gradient, ``decay`` is decoupled; ``gradient`` multiplies every
gradient: ±1 / GradScaler's scale; ``peak_lr`` is the largest lr of the schedule."""

SUMS = ("gd", "xd", "gg", "xx", "uu", "count")
"""Columns of a row of the sums, float64: g·Δ (of the running form g·(x − x_ref)), x·Δ, g·g, x·x,
and of the running form u·u at the peak lr and the number of elements that have a gradient."""

GD, XD, GG, XX, UU, COUNT = range(len(SUMS))

TUNER = ("s", "r", "v", "m")
"""Blocks of a row of the tuner's state, float64, one number per tuner beta; then COUNTERS."""

COUNTERS = ("steps", "nonfinite")
"""The last columns of a row of the tuner's state; only the first row's ``nonfinite`` is used."""

CONSTANTS = (
    *("decay", "s_init", "eps", "eps_in_m", "clamps_h", "floors_r"),
    *("tunes_scale", "annealing_factor"),
)
"""The tuner's constants, float64; the tuner betas follow them."""

LOG_TUNER = (
    *("scale", "mean_square", "moves", "steps", "nonfinite", "informed", "learns"),
    *("weight", "ln_update", "ln_ratio", "start_ratio", "start", "anchors", "ln_anchor"),
    *("factor", "peak_rate"),
)
"""Columns of a row of the log tuner's state, float64: S; the mean square of h and the number of
moves of ln S; the counters; the steps with a gradient and an update; 1 once S learns from h; the
sum of the weights of moving averages of ln √(u·u) and of ln(√(u·u)/√(g·g)), those averages, and the
latter and S at the last estimate; the number and the mean of the ln(loss/(√(g·g)·√(u·u))) before S
learned; lr/(peak lr) of the last step, before S learns the largest; and the largest
S·lr/(peak lr)."""

LOG_CONSTANTS = (
    *("tunes_scale", "factor", "norm_share", "anchor_share", "loss_range", "least_rms", "average"),
    *("held", "gain", "max_move", "bias", "outlier", "memory", "ceiling"),
    *("norm_ceiling", "regrowth"),
)
"""The log tuner's constants, float64; see ``formulas.log_tune_row``."""

LOSSES = ("sum", "count")
"""The losses observed since the last step, float64."""

KINDS = ("sgd", "momentum", "adam", "lion")
"""The fused updates; kernels know each by its index here."""

MUON = "muon"
"""The update of matrices, which is made of products of them: no kernel's."""

STATES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    MUON: ("momentum_buffer",),
}
"""Update → the names of its state tensors, in the order state0, state1."""

OWN_STATE = ("x_ref", "delta", "x_low")
"""The entries that Mechanic adds to a parameter's state: x_ref, then Δ in the exact forms, and in
the running form the low bits of 16-bit weights."""

STEPPED = ("momentum", "adam")
"""The updates that count a weight's steps: Adam's bias corrections, SGD's first momentum."""

REFERENCE_BLOCK, REFERENCE_EVERY = 128, 8
"""With ``x_ref_every=8`` x_ref is kept for the first of every 8 blocks of 128 elements. A warp of a
GPU takes one such block of float32 numbers at a time, and 8 warps are a thread block."""

REFERENCE_PERIOD = REFERENCE_EVERY * REFERENCE_BLOCK

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of weights that kernels support."""

STORED_DTYPES = (*KERNEL_DTYPES, torch.int8)
"""Those and int8, which stands for codes, of Δ too; kernels know each by its index here."""

HALF_DTYPES = (torch.bfloat16, torch.float16)
"""The dtypes of weights beside which the running form keeps low bits."""

MOST_SCALE = 1e30
"""The largest S that a run starts with: where updates are tiny, it must not overflow in float32."""

WITHOUT_FLOAT64 = {"mps"}
"""Types of devices that have no float64: beside weights there the tuner's numbers are on the CPU,
and a step's sums are taken in float32 and added up on the CPU. Squares of gradients and weights,
summed up, must be numbers of float32 there: about 1e-19 to 1e19 an element."""

CPU_CHUNK = 1 << 17
"""Elements of a chunk on a CPU: small enough that threads share a model evenly, large enough that
starting to read its streams costs little."""

GPU_CHUNK = 1 << 13
"""Elements of a chunk on a GPU, one block's work: short enough that the last blocks of a launch end
together, long enough (8 rounds of 16-byte loads) that starting one costs little."""


def tuner_width(betas: int) -> int:
    """Return the number of columns of the tuner's state for this number of tuner betas."""
    return len(TUNER) * betas + len(COUNTERS)


def has_float64(device: torch.device) -> bool:
    """Return whether tensors of float64 can be on a device."""
    return device.type not in WITHOUT_FLOAT64


def device_of_numbers(device: torch.device) -> torch.device:
    """Return where float64 numbers are kept beside weights of a device."""
    return device if has_float64(device) else torch.device("cpu")


def dtype_of_sums(device: torch.device) -> torch.dtype:
    """Return the dtype in which sums over weights of a device are taken."""
    return torch.float64 if has_float64(device) else torch.float32


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for weights of a dtype, C++'s ``opmath_t``."""
    return torch.float64 if dtype is torch.float64 else torch.float32
