"""tune: the scales learn from their sums."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mechanic_fused.tuner import Tuner

from .formulas import is_finite, total_scale, tuner_constants, tuner_h, tuner_update
from .layout import (
    CONSTANTS_BETAS,
    COUNTERS_COLUMNS,
    COUNTERS_NONFINITE,
    COUNTERS_STEPS,
    SUMS_COLUMNS,
    SUMS_GD,
    SUMS_GG,
    SUMS_XD,
    SUMS_XX,
    TUNER_BLOCKS,
    TUNER_M,
    TUNER_R,
    TUNER_S,
    TUNER_V,
)
from .storage import on

# Scales in a block; one program takes any number of scales in few rounds.
ROWS = 32


@triton.jit(do_not_specialize=["rows"])
def tune_kernel(
    sums, state, constants, found_inf, rows, BETAS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """h from the sums of each scale; then its s, r, v, m from h, all in float64.

    One program for all scales. A row whose sums or h are not finite keeps its numbers; the first
    row's second counter counts the steps in which any row was not. COLUMNS is a power of two ≥
    BETAS.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    c = tuner_constants(constants, BETAS)
    learners = tl.where(c.tunes_scale, rows, 0)
    column = tl.arange(0, COLUMNS)[None, :]
    beta = tl.load(constants + CONSTANTS_BETAS + column, mask=column < BETAS, other=0.0)
    width: tl.constexpr = TUNER_BLOCKS * BETAS + COUNTERS_COLUMNS
    counters: tl.constexpr = TUNER_BLOCKS * BETAS
    nonfinite = 0
    start = 0
    # Not `for start in range(...)`: in the interpreter, range takes no tensors.
    while start < rows:
        row = start + tl.arange(0, ROWS)
        here = row < rows
        row_at = state + row * width
        sums_at = sums + row * SUMS_COLUMNS
        gd = tl.load(sums_at + SUMS_GD, mask=here, other=0.0)
        xd = tl.load(sums_at + SUMS_XD, mask=here, other=0.0)
        gg = tl.load(sums_at + SUMS_GG, mask=here, other=0.0)
        xx = tl.load(sums_at + SUMS_XX, mask=here, other=0.0)
        scale = total_scale(row_at + TUNER_S * BETAS, here, BETAS)
        h = tuner_h(gd, xd, gg, xx, scale, c.decay, c.eps)
        finite = is_finite(gd) & is_finite(xd) & is_finite(gg) & is_finite(xx) & is_finite(h)
        nonfinite += tl.sum(tl.where(finite, 0, 1), 0)

        at = row_at[:, None] + column
        mask = here[:, None] & (column < BETAS)
        s = tl.load(at + TUNER_S * BETAS, mask=mask, other=0.0)
        r = tl.load(at + TUNER_R * BETAS, mask=mask, other=0.0)
        v = tl.load(at + TUNER_V * BETAS, mask=mask, other=0.0)
        m = tl.load(at + TUNER_M * BETAS, mask=mask, other=0.0)
        s, r, v, m = tuner_update(h[:, None], s, r, v, m, beta, c)
        learns = mask & (finite & (row < learners))[:, None]
        tl.store(at + TUNER_S * BETAS, s, mask=learns)
        tl.store(at + TUNER_R * BETAS, r, mask=learns)
        tl.store(at + TUNER_V * BETAS, v, mask=learns)
        tl.store(at + TUNER_M * BETAS, m, mask=learns)
        steps = row_at + counters + COUNTERS_STEPS
        tl.store(steps, tl.load(steps, mask=here, other=0.0) + 1.0, mask=here)
        start += ROWS
    if nonfinite > 0:
        count = state + counters + COUNTERS_NONFINITE
        tl.store(count, tl.load(count) + 1.0)


def tune(sums: Tensor, tuner: Tuner) -> None:
    """Update ``tuner.state`` from the sums, (scales, 6) float64."""
    n = len(tuner.betas)
    with on(sums.device):
        tune_kernel[(1,)](
            sums,
            tuner.state,
            tuner.constants,
            tuner.found_inf,
            len(tuner.keys),
            BETAS=n,
            COLUMNS=triton.next_power_of_2(n),
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
