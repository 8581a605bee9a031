"""tune: the scale learns from the four sums."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mechanic_fused.tuner import Tuner

from .storage import on

# Scales in a block: any number of them takes few rounds of one program.
ROWS = 32


@triton.jit
def learn(h, s, r, v, m, beta, s_init, eps, eps_in_m, clamps_h, floors_r, pace):
    """One update of s, r, v, m, (rows, betas), from h, (rows, 1). ``s_init``: over the betas.

    Where S anneals with the schedule, s takes a part of its move, ``pace``.
    """
    reward_h = tl.where(clamps_h, tl.maximum(tl.minimum(h, m), -m), h)
    m = tl.maximum(beta * m, tl.abs(h) + tl.where(eps_in_m, eps, 0.0))
    v = beta * beta * v + h * h
    r = beta * r - reward_h * s
    r = tl.where(floors_r, tl.maximum(r, 0.0), r)
    to = (s_init * m + tl.maximum(r, 0.0)) / (tl.sqrt(v) + eps)
    s = tl.where(pace < 1, s + pace * (to - s), to)
    return s, r, v, m


@triton.jit
def is_finite(x):
    return x - x == 0


@triton.jit(do_not_specialize=["rows"])
def tune_kernel(
    sums, state, constants, found_inf, rows, BETAS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """h = g·Δ + λ·S·√(g·g)/(√(x·x) + ε)·(x·Δ); then s, r, v, m of each row, all in float64.

    One program for all scales. A row whose sums or h are not finite keeps its numbers; the first
    row's second counter counts the steps at which any was not. COLUMNS is a power of two ≥ BETAS.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    decay = tl.load(constants)
    s_init = tl.load(constants + 1) / BETAS
    eps = tl.load(constants + 2)
    eps_in_m = tl.load(constants + 3) != 0
    clamps_h = tl.load(constants + 4) != 0
    floors_r = tl.load(constants + 5) != 0
    learners = tl.where(tl.load(constants + 6) != 0, rows, 0)
    pace = tl.load(constants + 7)
    column = tl.arange(0, COLUMNS)[None, :]
    beta = tl.load(constants + 8 + column, mask=column < BETAS, other=0.0)
    width: tl.constexpr = 4 * BETAS + 2
    nonfinite = 0
    start = 0
    # The interpreter's `range` knows no numbers that are tensors.
    while start < rows:
        row = start + tl.arange(0, ROWS)
        here = row < rows
        s_at = state + row * width
        gd = tl.load(sums + row * 4, mask=here, other=0.0)
        xd = tl.load(sums + row * 4 + 1, mask=here, other=0.0)
        gg = tl.load(sums + row * 4 + 2, mask=here, other=0.0)
        xx = tl.load(sums + row * 4 + 3, mask=here, other=0.0)
        scale = tl.load(s_at, mask=here, other=0.0)
        for i in tl.static_range(1, BETAS):
            scale = scale + tl.load(s_at + i, mask=here, other=0.0)
        h = gd + decay * scale * tl.sqrt(gg) / (tl.sqrt(xx) + eps) * xd
        finite = is_finite(gd) & is_finite(xd) & is_finite(gg) & is_finite(xx) & is_finite(h)
        nonfinite += tl.sum(tl.where(finite, 0, 1), 0)

        at = s_at[:, None] + column
        mask = here[:, None] & (column < BETAS)
        s = tl.load(at, mask=mask, other=0.0)
        r = tl.load(at + BETAS, mask=mask, other=0.0)
        v = tl.load(at + 2 * BETAS, mask=mask, other=0.0)
        m = tl.load(at + 3 * BETAS, mask=mask, other=0.0)
        s, r, v, m = learn(
            h[:, None], s, r, v, m, beta, s_init, eps, eps_in_m, clamps_h, floors_r, pace
        )
        learns = mask & (finite & (row < learners))[:, None]
        tl.store(at, s, mask=learns)
        tl.store(at + BETAS, r, mask=learns)
        tl.store(at + 2 * BETAS, v, mask=learns)
        tl.store(at + 3 * BETAS, m, mask=learns)
        steps = s_at + 4 * BETAS
        tl.store(steps, tl.load(steps, mask=here, other=0.0) + 1.0, mask=here)
        start += ROWS
    if nonfinite > 0:
        count = state + 4 * BETAS + 1
        tl.store(count, tl.load(count) + 1.0)


def tune(sums: Tensor, tuner: Tuner) -> None:
    """Learn S from the sums, (scales, 4) float64; ``tuner.state`` changes in place."""
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
