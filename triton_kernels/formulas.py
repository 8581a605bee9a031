"""Every formula of a step, in Triton: registers in, registers out.

``mechanic_fused/backends/formulas.py`` and ``csrc/formulas.h`` state the same formulas under the
same names.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .layout import (
    CONSTANTS_ANNEALING_FACTOR,
    CONSTANTS_CLAMPS_H,
    CONSTANTS_DECAY,
    CONSTANTS_EPS,
    CONSTANTS_EPS_IN_M,
    CONSTANTS_FLOORS_R,
    CONSTANTS_S_INIT,
    CONSTANTS_TUNES_SCALE,
    HYPER_BETA1,
    HYPER_BETA2,
    HYPER_DECAY,
    HYPER_EPS,
    HYPER_GRADIENT,
    HYPER_L2,
    HYPER_LR,
    HYPER_NESTEROV,
    HYPER_PEAK_LR,
    LOG_ANCHORS,
    LOG_CONSTANTS_ANCHOR_SHARE,
    LOG_CONSTANTS_AVERAGE,
    LOG_CONSTANTS_BIAS,
    LOG_CONSTANTS_CEILING,
    LOG_CONSTANTS_FACTOR,
    LOG_CONSTANTS_GAIN,
    LOG_CONSTANTS_HELD,
    LOG_CONSTANTS_LEAST_RMS,
    LOG_CONSTANTS_LOSS_RANGE,
    LOG_CONSTANTS_MAX_MOVE,
    LOG_CONSTANTS_MEMORY,
    LOG_CONSTANTS_NORM_CEILING,
    LOG_CONSTANTS_NORM_SHARE,
    LOG_CONSTANTS_OUTLIER,
    LOG_CONSTANTS_REGROWTH,
    LOG_CONSTANTS_TUNES_SCALE,
    LOG_FACTOR,
    LOG_INFORMED,
    LOG_LEARNS,
    LOG_LN_ANCHOR,
    LOG_LN_RATIO,
    LOG_LN_UPDATE,
    LOG_MEAN_SQUARE,
    LOG_MOVES,
    LOG_NONFINITE,
    LOG_PEAK_RATE,
    LOG_SCALE,
    LOG_START,
    LOG_START_RATIO,
    LOG_STEPS,
    LOG_WEIGHT,
    LOSSES_COUNT,
    LOSSES_SUM,
    MOST_SCALE,
)
from .storage import read


@triton.jit
def divide(a, b):
    """a / b, rounded once; Triton's own float32 division is up to 2 ulp off."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def root(x):
    """√x, rounded once; Triton's own float32 root is approximate."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def sign(x):
    """−1, 0 or 1 in x's dtype; 0 for NaN."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def is_finite(x):
    return x - x == 0


@triton.jit
def finite_or_zero(g):
    """g, or 0 where it is NaN or infinite."""
    return tl.where(g - g == 0, g, 0.0)


@triton.jit
def power(base, exponent):
    """base ** exponent in float64 for 0 ≤ base ≤ 1 and a whole exponent, by repeated squaring.

    Squaring doubles the relative error, which grows to exponent · 2⁻⁵³; the power becomes small
    meanwhile, so its absolute error stays below 2⁻⁵³ / (1 − base).
    """
    result = base * 0.0 + 1.0
    left = exponent.to(tl.int32)
    while left > 0:
        result = tl.where(left % 2 == 1, result * base, result)
        base = base * base
        left = left // 2
    return result


@triton.jit
def peak_ratio(hyper):
    """The peak lr over lr of a row of hyperparameters, float64; 0 where lr is 0."""
    lr = tl.load(hyper + HYPER_LR)
    return tl.where(lr != 0, tl.load(hyper + HYPER_PEAK_LR) / lr, 0.0)


class Coefficients(NamedTuple):
    """The scalars of one update: computed in float64 once a chunk, then rounded to T."""

    gradient: tl.tensor  # multiplies g, see gradient_multiplier
    beta1: tl.tensor
    rest1: tl.tensor  # 1 - beta1, or SGD's 1 - dampening
    beta2: tl.tensor
    rest2: tl.tensor
    eps: tl.tensor
    l2: tl.tensor
    rate: tl.tensor  # lr, for Adam over its first bias correction
    decay: tl.tensor  # lr · decoupled weight decay
    correction2: tl.tensor  # Adam's 1/√(1 − β₂ᵗ)
    nesterov: tl.tensor


@triton.jit
def clip_coefficient(clip):
    """min(1, max_norm/(N + 1e-6)) of clip = (N², max_norm), as torch's ``clip_grad_norm_`` does."""
    c = tl.load(clip + 1) / (tl.sqrt(tl.load(clip)) + 1e-6)
    return tl.where(c < 1.0, c, 1.0)


@triton.jit
def gradient_multiplier(hyper, grad_scale, clip):
    """The factor of a gradient, float64: ±1 / GradScaler's scale, times the clip coefficient."""
    gradient = tl.load(hyper + HYPER_GRADIENT)
    if grad_scale is not None:
        gradient = gradient * (1.0 / tl.load(grad_scale).to(tl.float64))
    if clip is not None:
        gradient = gradient * clip_coefficient(clip)
    return gradient


@triton.jit
def coefficients(hyper, grad_scale, clip, step, KIND: tl.constexpr, T: tl.constexpr):
    """The coefficients of a weight's update number step + 1, from a row of hyperparameters."""
    lr = tl.load(hyper + HYPER_LR)
    beta1 = tl.load(hyper + HYPER_BETA1)
    beta2 = tl.load(hyper + HYPER_BETA2)
    eps = tl.load(hyper + HYPER_EPS)
    l2 = tl.load(hyper + HYPER_L2)
    decay = lr * tl.load(hyper + HYPER_DECAY)
    nesterov = tl.load(hyper + HYPER_NESTEROV) != 0
    rest1 = 1.0 - beta1
    rate = lr
    correction2 = lr
    if KIND == "momentum":
        rest1 = tl.where(step == 0, 1.0, 1.0 - beta2)
    if KIND == "adam":
        rate = lr / (1.0 - power(beta1, step + 1))
        correction2 = 1.0 / tl.sqrt(1.0 - power(beta2, step + 1))
    return Coefficients(
        gradient_multiplier(hyper, grad_scale, clip).to(T),
        beta1.to(T),
        rest1.to(T),
        beta2.to(T),
        (1.0 - beta2).to(T),
        eps.to(T),
        l2.to(T),
        rate.to(T),
        decay.to(T),
        correction2.to(T),
        nesterov,
    )


@triton.jit
def hash32(n):
    """The hash "lowbias32" of uint32 numbers; each bit depends on every input bit.

    Source: C. Wellons, Prospecting for Hash Functions, 2018.
    """
    n = (n ^ (n >> 16)) * 0x7FEB352D
    n = (n ^ (n >> 15)) * 0x846CA68B
    return n ^ (n >> 16)


@triton.jit
def rounding_seed(step_count, number):
    """The seed of the random bits of weight ``number`` after ``step_count`` steps, uint32."""
    return hash32(hash32(step_count.to(tl.int64).to(tl.uint32)) + number.to(tl.uint32))


@triton.jit
def random_bits16(seed, element):
    """16 random bits for each element, uint32, given its index in the weight's storage."""
    return hash32(element + seed) >> 16


@triton.jit
def stochastic_round(bits, x):
    """Round float32 x to bfloat16, away from 0 with probability equal to the discarded fraction.

    ``bits`` are 16 random bits for each element, uint32. x is the result of an operation, so its
    NaNs are quiet: they stay NaN when their low bits are cut off, but adding to them could turn
    them into numbers.
    """
    bits = tl.where(x == x, bits, 0)
    high = (x.to(tl.uint32, bitcast=True) + bits) >> 16
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def sgd(g, x, c):
    """u = −lr·(g + l2·x)."""
    return -(c.rate * (g + c.l2 * x))


@triton.jit
def momentum(g, x, buffer, c):
    """buffer = μ·buffer + (1 − dampening)·d, at first d; u = −lr·buffer, or Nesterov's."""
    d = g + c.l2 * x
    buffer = c.beta1 * buffer + c.rest1 * d
    return -(c.rate * tl.where(c.nesterov, d + c.beta1 * buffer, buffer)), buffer


@triton.jit
def adam(g, x, m, v, c):
    """u = −(lr/(1−β₁ᵗ))·m / (√v·1/√(1−β₂ᵗ) + ε) − lr·decay·x, as torch's Adam and AdamW."""
    # Beside a decoupled decay x may be infinite, and 0 times it would spoil m and v.
    g = tl.where(c.l2 != 0, g + c.l2 * x, g)
    m = c.beta1 * m + c.rest1 * g
    v = c.beta2 * v + c.rest2 * (g * g)
    direction = divide(c.rate * m, root(v) * c.correction2 + c.eps)
    return -direction - c.decay * x, m, v


@triton.jit
def lion(g, x, m, c):
    """u = −lr·(sign(β₁·m + (1−β₁)·g) + decay·x); m = β₂·m + (1−β₂)·g. Source: arXiv 2302.06675."""
    direction = sign(c.beta1 * m + c.rest1 * g)
    return -(c.rate * direction) - c.decay * x, c.beta2 * m + c.rest2 * g


@triton.jit
def muon_momentum(g, buffer, c):
    """n of Muon, and the new buffer."""
    added = c.rest1 * g
    buffer = c.beta1 * buffer + added
    return tl.where(c.nesterov, c.beta1 * buffer + added, buffer), buffer


@triton.jit
def muon_update(d, x, c):
    """u = −lr·(d + decay·x), where d = ratio·O."""
    return tl.where(c.decay != 0, -(c.rate * d) - c.decay * x, -(c.rate * d))


@triton.jit
def low_unit(x, SIGN: tl.constexpr):
    """2⁻¹⁶ of the last place of a float16, float32; with SIGN −1 its reciprocal."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.where(exponent < 113, 113, exponent) - 26
    if SIGN < 0:
        exponent = 254 - exponent
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def join(x, low):
    """The float32 numbers that are kept as 16-bit numbers and 16 low bits, int16, beside them.

    Whoever writes the 16-bit number alone moves the float32 one by less than half its last place,
    and a 0 that is written stays 0.
    """
    if x.dtype == tl.bfloat16:
        # The low bits are the lower half, counted from the bfloat16, which is the nearest one.
        high = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        magnitude = high & 0x7FFFFFFF
        exact = (magnitude == 0) | (magnitude >= 0x7F800000)
        joined = high + low.to(tl.int32).to(tl.uint32, bitcast=True)
        return tl.where(exact, high, joined).to(tl.float32, bitcast=True)
    else:
        # A half has fewer exponents than a float: they count fractions of its last place.
        high = x.to(tl.float32)
        return high + low.to(tl.float32) * low_unit(high, 1)


@triton.jit
def split(wide, dtype: tl.constexpr):
    """The nearest 16-bit numbers, ties away from 0 for bfloat16, and the low bits, int16."""
    if dtype == tl.bfloat16:
        bits = wide.to(tl.uint32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        high = tl.where(is_nan, (bits >> 16) | 0x7FC0, (bits + 0x8000) >> 16)
        low = bits.to(tl.uint16).to(tl.int16, bitcast=True)
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), low
    else:
        x = wide.to(dtype)
        high = x.to(tl.float32)
        rest = (wide - high) * low_unit(high, -1)
        rest = tl.where(rest > 32767.0, 32767.0, tl.where(rest < -32767.0, -32767.0, rest))
        away = tl.where(rest < 0, rest - 0.5, rest + 0.5)
        # Of an infinite or NaN x the rest is NaN.
        return x, tl.where(rest == rest, away, 0.0).to(tl.int32).to(tl.int16)


@triton.jit
def apply_update(x, s, u):
    """x + S·u; ``s`` is S in the dtype of arithmetic."""
    return x + s * u


@triton.jit
def apply_scale(x_ref, s, delta):
    """x_ref + S·Δ; ``s`` is S in the dtype of arithmetic."""
    return x_ref + s * delta


@triton.jit
def total_scale(s_at, mask, BETAS: tl.constexpr):
    """S = Σ s, float64, summed in the order of the tuner betas; 0 where the mask is false."""
    total = read(s_at, mask)
    for i in tl.static_range(1, BETAS):
        total = total + read(s_at + i, mask)
    return total


@triton.jit
def tuner_h(gd, xd, gg, xx, scale, decay, eps):
    """h = g·Δ + λ·S·√(g·g)/(√(x·x) + ε)·(x·Δ)."""
    return gd + decay * scale * tl.sqrt(gg) / (tl.sqrt(xx) + eps) * xd


class TunerConstants(NamedTuple):
    """The tuner's constants, float64 and bool."""

    decay: tl.tensor
    s_init: tl.tensor  # over the number of tuner betas
    eps: tl.tensor
    eps_in_m: tl.tensor
    clamps_h: tl.tensor
    floors_r: tl.tensor
    tunes_scale: tl.tensor
    annealing_factor: tl.tensor


@triton.jit
def tuner_constants(constants, BETAS: tl.constexpr):
    """The constants of ``layout.CONSTANTS``."""
    return TunerConstants(
        tl.load(constants + CONSTANTS_DECAY),
        tl.load(constants + CONSTANTS_S_INIT) / BETAS,
        tl.load(constants + CONSTANTS_EPS),
        tl.load(constants + CONSTANTS_EPS_IN_M) != 0,
        tl.load(constants + CONSTANTS_CLAMPS_H) != 0,
        tl.load(constants + CONSTANTS_FLOORS_R) != 0,
        tl.load(constants + CONSTANTS_TUNES_SCALE) != 0,
        tl.load(constants + CONSTANTS_ANNEALING_FACTOR),
    )


@triton.jit
def tuner_update(h, s, r, v, m, beta, c):
    """The new s, r, v, m, each (scales, betas), from h, (scales, 1), and TunerConstants.

    ĥ = clamp(h, −m, m) or h;  m = max(β·m, |h| + ε or |h|);  v = β²·v + h²;  r = β·r − ĥ·s, clamped
    at 0 in some variants;  s = ((s_init/n)·m + max(0, r))/(√v + ε), or a fraction of that move.
    """
    reward_h = tl.where(c.clamps_h, tl.maximum(tl.minimum(h, m), -m), h)
    m = tl.maximum(beta * m, tl.abs(h) + tl.where(c.eps_in_m, c.eps, 0.0))
    v = beta * beta * v + h * h
    r = beta * r - reward_h * s
    r = tl.where(c.floors_r, tl.maximum(r, 0.0), r)
    s_new = (c.s_init * m + tl.maximum(r, 0.0)) / (tl.sqrt(v) + c.eps)
    s = tl.where(c.annealing_factor < 1, s + c.annealing_factor * (s_new - s), s_new)
    return s, r, v, m


class LogRow(NamedTuple):
    """Rows of the log tuner's state, the columns of ``layout.LOG_TUNER`` in order, float64."""

    scale: tl.tensor
    mean_square: tl.tensor
    moves: tl.tensor
    steps: tl.tensor
    nonfinite: tl.tensor
    informed: tl.tensor
    learns: tl.tensor
    weight: tl.tensor
    ln_update: tl.tensor
    ln_ratio: tl.tensor
    start_ratio: tl.tensor
    start: tl.tensor
    anchors: tl.tensor
    ln_anchor: tl.tensor
    factor: tl.tensor
    peak_rate: tl.tensor


@triton.jit
def log_rows(at, mask):
    """The rows of the log tuner's state at these pointers; 0 where the mask is false."""
    return LogRow(
        read(at + LOG_SCALE, mask),
        read(at + LOG_MEAN_SQUARE, mask),
        read(at + LOG_MOVES, mask),
        read(at + LOG_STEPS, mask),
        read(at + LOG_NONFINITE, mask),
        read(at + LOG_INFORMED, mask),
        read(at + LOG_LEARNS, mask),
        read(at + LOG_WEIGHT, mask),
        read(at + LOG_LN_UPDATE, mask),
        read(at + LOG_LN_RATIO, mask),
        read(at + LOG_START_RATIO, mask),
        read(at + LOG_START, mask),
        read(at + LOG_ANCHORS, mask),
        read(at + LOG_LN_ANCHOR, mask),
        read(at + LOG_FACTOR, mask),
        read(at + LOG_PEAK_RATE, mask),
    )


class LogConstants(NamedTuple):
    """The log tuner's constants, float64."""

    tunes_scale: tl.tensor
    factor: tl.tensor
    norm_share: tl.tensor
    anchor_share: tl.tensor
    loss_range: tl.tensor
    least_rms: tl.tensor
    average: tl.tensor
    held: tl.tensor
    gain: tl.tensor
    max_move: tl.tensor
    bias: tl.tensor
    outlier: tl.tensor
    memory: tl.tensor
    ceiling: tl.tensor
    norm_ceiling: tl.tensor
    regrowth: tl.tensor


@triton.jit
def log_constants(constants):
    """The constants of ``layout.LOG_CONSTANTS``."""
    return LogConstants(
        tl.load(constants + LOG_CONSTANTS_TUNES_SCALE),
        tl.load(constants + LOG_CONSTANTS_FACTOR),
        tl.load(constants + LOG_CONSTANTS_NORM_SHARE),
        tl.load(constants + LOG_CONSTANTS_ANCHOR_SHARE),
        tl.load(constants + LOG_CONSTANTS_LOSS_RANGE),
        tl.load(constants + LOG_CONSTANTS_LEAST_RMS),
        tl.load(constants + LOG_CONSTANTS_AVERAGE),
        tl.load(constants + LOG_CONSTANTS_HELD),
        tl.load(constants + LOG_CONSTANTS_GAIN),
        tl.load(constants + LOG_CONSTANTS_MAX_MOVE),
        tl.load(constants + LOG_CONSTANTS_BIAS),
        tl.load(constants + LOG_CONSTANTS_OUTLIER),
        tl.load(constants + LOG_CONSTANTS_MEMORY),
        tl.load(constants + LOG_CONSTANTS_CEILING),
        tl.load(constants + LOG_CONSTANTS_NORM_CEILING),
        tl.load(constants + LOG_CONSTANTS_REGROWTH),
    )


class ScaleSums(NamedTuple):
    """The columns of ``layout.SUMS`` that the log tuner reads."""

    gd: tl.tensor
    gg: tl.tensor
    xx: tl.tensor
    uu: tl.tensor
    count: tl.tensor


class WholeModel(NamedTuple):
    """What all scales have in common: ‖g‖·‖u‖, the number of elements, the loss of this step."""

    power: tl.tensor
    size: tl.tensor
    loss: tl.tensor


@triton.jit
def mean_loss(losses):
    """The mean of the observed losses; 0 where there is none."""
    count = tl.load(losses + LOSSES_COUNT)
    return tl.where(count > 0, tl.load(losses + LOSSES_SUM) / count, 0.0)


@triton.jit
def norm_estimate(sums, model, row, c):
    """S with S·‖u‖ = norm_share·‖x‖/∛n: the more elements (n), the less each may move.

    ‖u‖ is a geometric mean over the last steps, as is ‖u‖/‖g‖.

    Returns:
        S and the new (weight, ln_update, ln_ratio).
    """
    norm = tl.maximum(tl.sqrt(sums.xx), c.least_rms * tl.sqrt(sums.count))
    weight = row.weight + (1.0 - row.weight) / c.average
    now, memory = 0.5 * tl.log(sums.uu), c.average * weight
    ln_update = row.ln_update + (now - row.ln_update) / memory
    ln_ratio = row.ln_ratio + (now - 0.5 * tl.log(sums.gg) - row.ln_ratio) / memory
    estimate = c.norm_share * norm * tl.exp(-ln_update - tl.log(model.size) / 3.0)
    return estimate, weight, ln_update, ln_ratio


@triton.jit
def loss_estimate(anchors, ln_anchor, c):
    """S with S·‖g‖·‖u‖ = anchor_share·loss, geometric means over the steps so far; 0: unknown."""
    # No float64 is larger than the exponential of 709.
    return tl.where(anchors > 0, c.anchor_share * tl.exp(tl.minimum(ln_anchor, 709.0)), 0.0)


@triton.jit
def joint_estimate(by_loss, norm, c):
    """The geometric mean of the two; by the loss it counts within a factor of that by norms.

    ``by_loss`` 0: unknown.
    """
    bounded = tl.minimum(tl.maximum(by_loss, norm / c.loss_range), c.loss_range * norm)
    return tl.where(by_loss == 0, norm, tl.sqrt(bounded * norm))


@triton.jit
def estimate_scale(norm, model, row, c):
    """S where a run starts, between two estimates.

    A step lowers the loss by no more than a share of it, by Cauchy and Schwarz; and a step is a
    share of the weights' norm. Without a loss the latter alone. ``norm`` is the estimate by norms.

    Returns:
        The new (scale, anchors, ln_anchor).
    """
    # Numbers, not `&`, where a scalar meets rows: the interpreter cannot broadcast a truth value.
    has_loss = (model.loss > 0) & is_finite(model.loss)
    has_loss = has_loss & (model.power > 0) & is_finite(model.power)
    anchors = row.anchors + tl.where(has_loss, 1.0, 0.0)
    decrease = tl.log(model.loss) - tl.log(model.power)
    moved = row.ln_anchor + (decrease - row.ln_anchor) / anchors
    ln_anchor = tl.where(anchors > row.anchors, moved, row.ln_anchor)
    scale = joint_estimate(loss_estimate(anchors, ln_anchor, c), norm, c)
    return tl.minimum(scale, MOST_SCALE), anchors, ln_anchor


@triton.jit
def log_tuner_update(h, before, informed, row, c):
    """z = clamp(−h/√v, −1, 1);  ln S += min(max_move, gain/(t + 1))·(z + bias).

    v is a mean square of h over the later steps; one h counts at most ``outlier``·√v. ``before``
    is S before the step.

    Returns:
        The new (scale, mean_square, moves).
    """
    limit = c.outlier * tl.sqrt(row.mean_square)
    h = tl.where(limit > 0, tl.maximum(tl.minimum(h, limit), -limit), h)
    square = row.mean_square + (h * h - row.mean_square) / (1.0 + row.moves / c.memory)
    z = tl.maximum(tl.minimum(-h / tl.sqrt(square), 1.0), -1.0)
    factor = tl.exp(tl.minimum(c.max_move, c.gain / (informed + 1.0)) * (z + c.bias))
    return tl.where(square > 0, before * factor, before), square, row.moves + 1.0


@triton.jit
def learn_scale(h, norm, ln_ratio, estimated, rises, informed, row, c):
    """S learns from h within bounds.

    S·lr does not grow above a multiple of where it started, or of more where the base has since
    come to make less of a gradient, as Adagrad does; without a loss, of the estimate by the norms
    as they are now. Where a schedule rises again it stays below a multiple of what it has been.
    ``norm`` is the estimate by norms and ``ln_ratio`` the new average, of no meaning where S was
    not ``estimated``.

    Returns:
        The new (scale, mean_square, moves).
    """
    # The lr has risen to a fraction of the peak that the estimate was for, and falls.
    first = (row.learns == 0) & estimated & (c.factor < row.factor)
    before = tl.where(first, row.scale / row.factor, row.scale)
    scale, square, moves = log_tuner_update(h, before, informed, row, c)
    shrunk = tl.exp(tl.minimum(tl.maximum(row.start_ratio - ln_ratio, 0.0), 709.0))
    by_start = c.ceiling * row.start * shrunk
    ceiling = tl.where(row.anchors > 0, by_start, c.norm_ceiling * norm) / c.factor
    scale = tl.where(estimated, tl.minimum(scale, tl.maximum(before, ceiling)), scale)
    again = rises & (row.peak_rate > 0)
    scale = tl.where(again, tl.minimum(scale, c.regrowth * row.peak_rate / c.factor), scale)
    return scale, square, moves


@triton.jit
def log_tune_row(sums, model, row, c):
    """The new rows of the log tuner's state, and whether their sums were finite.

    While the lr rises to its peak, and in the first steps, S is an estimate; then it learns. A
    scale that is there before any estimate is the user's, and no estimate changes it.
    """
    finite = is_finite(sums.gd * sums.gd) & is_finite(sums.gg)
    finite = finite & is_finite(sums.xx) & is_finite(sums.uu)
    stays = tl.where(c.tunes_scale == 0, row.scale, 0.0) > 0
    moves = finite & (sums.gg > 0) & (sums.uu > 0) & (stays == 0)
    rises = c.factor > row.factor * (1.0 + 1e-6)  # and not by a rounding
    informed = row.informed + 1.0
    estimates = (row.learns == 0) & (rises | (informed <= c.held))
    given = (row.weight == 0) & (row.scale > 0)
    norm, weight, ln_update, ln_ratio = norm_estimate(sums, model, row, c)
    estimate, anchors, ln_anchor = estimate_scale(norm, model, row, c)
    learned, square, count = learn_scale(
        sums.gd, norm, ln_ratio, row.weight > 0, rises, informed, row, c
    )
    scale = tl.where(estimates, tl.where(given, row.scale, estimate), learned)
    factor = tl.where(estimates, tl.maximum(row.factor, c.factor), c.factor)
    # An estimate is of the S at the peak.
    peak_rate = tl.maximum(row.peak_rate, scale * tl.where(estimates, 1.0, c.factor))
    learns, starts = moves & (estimates == 0), moves & estimates & (given == 0)
    # Where S is the user's and learns, there is no estimate that could bound it.
    averages = starts | (learns & (row.weight > 0))
    new = LogRow(
        tl.where(moves, scale, row.scale),
        tl.where(learns, square, row.mean_square),
        tl.where(learns, count, row.moves),
        row.steps + 1.0,
        row.nonfinite,
        tl.where(moves, informed, row.informed),
        tl.where(learns, 1.0, row.learns),
        tl.where(averages, weight, row.weight),
        tl.where(averages, ln_update, row.ln_update),
        tl.where(averages, ln_ratio, row.ln_ratio),
        tl.where(starts, ln_ratio, row.start_ratio),
        tl.where(starts, scale, row.start),
        tl.where(starts, anchors, row.anchors),
        tl.where(starts, ln_anchor, row.ln_anchor),
        tl.where(moves, factor, row.factor),
        tl.where(moves, peak_rate, row.peak_rate),
    )
    return new, finite


@triton.jit
def step_along(w, c, d):
    """w − c·d."""
    return w - c * d


class AdaRem(NamedTuple):
    """AdaRem's coefficients: computed in float64 once a chunk, rounded to the compute dtype."""

    lr: tl.tensor
    beta: tl.tensor
    rest: tl.tensor  # 1 - beta
    gain: tl.tensor  # λᵗ / (max|m| + ε)
    decay: tl.tensor


@triton.jit
def adarem(g, x, m, c):
    """b = sign(g)·m/(max|m| + ε);  u = −lr·((1 + λᵗ·b)·g + decay·x);  m = β·m + (1−β)·g."""
    adjusted = (1.0 + c.gain * (sign(g) * m)) * g
    u = -(c.lr * (adjusted + c.decay * x))
    return u, c.beta * m + c.rest * g
