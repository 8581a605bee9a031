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
