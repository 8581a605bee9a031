"""log_tune: the scales of the running form learn from their sums and the observed losses."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mechanic_fused.log_tuner import LogTuner

from .formulas import ScaleSums, WholeModel, log_constants, log_rows, log_tune_row, mean_loss
from .layout import (
    LOG_COLUMNS,
    LOG_NONFINITE,
    LOSSES_COUNT,
    LOSSES_SUM,
    SUMS_COLUMNS,
    SUMS_COUNT,
    SUMS_GD,
    SUMS_GG,
    SUMS_UU,
    SUMS_XX,
)
from .storage import on, read

# Scales in a block; one program takes any number of scales in few rounds.
ROWS = 32


@triton.jit
def forget(losses):
    tl.store(losses + LOSSES_SUM, 0.0)
    tl.store(losses + LOSSES_COUNT, 0.0)


@triton.jit(do_not_specialize=["rows"])
def log_tune_kernel(sums, state, constants, losses, found_inf, rows, ROWS: tl.constexpr):
    """Each row of the log tuner's state from the sums of its scale, all in float64.

    One program for all scales. A row whose sums are not finite keeps its numbers, but the step
    counts; the first row's ``nonfinite`` counts the steps in which any row was not. The losses are
    forgotten, also those of a step that is not taken.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            forget(losses)
            return
    c = log_constants(constants)
    loss = mean_loss(losses)
    gg = tl.zeros((ROWS,), dtype=tl.float64)
    uu = tl.zeros((ROWS,), dtype=tl.float64)
    size = tl.zeros((ROWS,), dtype=tl.float64)
    start = 0
    # Not `for start in range(...)`: in the interpreter, range takes no tensors.
    while start < rows:
        row = start + tl.arange(0, ROWS)
        gg += read(sums + row * SUMS_COLUMNS + SUMS_GG, row < rows)
        uu += read(sums + row * SUMS_COLUMNS + SUMS_UU, row < rows)
        size += read(sums + row * SUMS_COLUMNS + SUMS_COUNT, row < rows)
        start += ROWS
    power = tl.sqrt(tl.sum(gg, 0)) * tl.sqrt(tl.sum(uu, 0))
    model = WholeModel(power, tl.sum(size, 0), loss)
    nonfinite = 0
    start = 0
    while start < rows:
        row = start + tl.arange(0, ROWS)
        here = row < rows
        sums_at = sums + row * SUMS_COLUMNS
        of_scales = ScaleSums(
            read(sums_at + SUMS_GD, here),
            read(sums_at + SUMS_GG, here),
            read(sums_at + SUMS_XX, here),
            read(sums_at + SUMS_UU, here),
            read(sums_at + SUMS_COUNT, here),
        )
        row_at = state + row * LOG_COLUMNS
        new, finite = log_tune_row(of_scales, model, log_rows(row_at, here), c)
        for k in tl.static_range(LOG_COLUMNS):
            tl.store(row_at + k, new[k], mask=here)
        nonfinite += tl.sum(tl.where(finite, 0, 1), 0)
        start += ROWS
    # Until here every thread has read the losses, and the first row is written.
    tl.debug_barrier()
    forget(losses)
    if nonfinite > 0:
        count = state + LOG_NONFINITE
        tl.store(count, tl.load(count) + 1.0)


def log_tune(sums: Tensor, tuner: LogTuner) -> None:
    """Update ``tuner.state`` from the sums, (scales, 6) float64, and forget the losses."""
    with on(sums.device):
        log_tune_kernel[(1,)](
            sums,
            tuner.state,
            tuner.constants,
            tuner.losses,
            tuner.found_inf,
            len(tuner.keys),
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
