"""Every formula of the base updates: registers in, registers out; reference.py states the same."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """a / b, rounded once; Triton's own float32 division errs by 2 ulp."""
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
def power(base, exponent):
    """base ** exponent in float64 for 0 ≤ base ≤ 1 and a whole exponent, by repeated squaring.

    Squaring doubles the relative error, which grows to exponent · 2⁻⁵³; but by then the power is
    small: its absolute error stays below 2⁻⁵³ / (1 − base).
    """
    result = base * 0.0 + 1.0
    left = exponent.to(tl.int32)
    while left > 0:
        result = tl.where(left % 2 == 1, result * base, result)
        base = base * base
        left = left // 2
    return result


class Coefficients(NamedTuple):
    """What an update needs beside registers: made in float64 once a chunk, here in T."""

    gradient: tl.tensor  # multiplies g: see multiplier
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
    """min(1, max_norm / (N + 1e-6)) of clip = (N², max_norm), as torch's clip_grad_norm_."""
    c = tl.load(clip + 1) / (tl.sqrt(tl.load(clip)) + 1e-6)
    return tl.where(c < 1.0, c, 1.0)


@triton.jit
def multiplier(hyper, grad_scale, clip):
    """What multiplies a gradient, float64: −1 to maximize, over GradScaler's scale, clipped."""
    gradient = tl.load(hyper + 7)
    if grad_scale is not None:
        gradient = gradient * (1.0 / tl.load(grad_scale).to(tl.float64))
    if clip is not None:
        gradient = gradient * clip_coefficient(clip)
    return gradient


@triton.jit
def coefficients(hyper, grad_scale, clip, step, KIND: tl.constexpr, T: tl.constexpr):
    """The coefficients of update number step + 1, from a row of hyperparameters."""
    lr = tl.load(hyper)
    beta1 = tl.load(hyper + 1)
    beta2 = tl.load(hyper + 2)
    eps = tl.load(hyper + 3)
    l2 = tl.load(hyper + 4)
    decay = lr * tl.load(hyper + 5)
    nesterov = tl.load(hyper + 6) != 0
    rest1 = 1.0 - beta1
    rate = lr
    correction2 = lr
    if KIND == "momentum":
        rest1 = tl.where(step == 0, 1.0, 1.0 - beta2)
    if KIND == "adam":
        rate = lr / (1.0 - power(beta1, step + 1))
        correction2 = 1.0 / tl.sqrt(1.0 - power(beta2, step + 1))
    return Coefficients(
        multiplier(hyper, grad_scale, clip).to(T),
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
    """A hash of uint32 in which each bit depends on all, "lowbias32".

    Source: C. Wellons, Prospecting for Hash Functions, 2018.
    """
    n = (n ^ (n >> 16)) * 0x7FEB352D
    n = (n ^ (n >> 15)) * 0x846CA68B
    return n ^ (n >> 16)


@triton.jit
def seed(steps, number):
    """What the random bits of weight ``number`` depend on, after so many steps."""
    return hash32(hash32(steps.to(tl.int64).to(tl.uint32)) + number.to(tl.uint32))


@triton.jit
def random_bits16(seed, element):
    """16 random bits for each element, uint32, which is its place in the weight's memory."""
    return hash32(element + seed) >> 16


@triton.jit
def sgd(g, x, c):
    """u = −lr·(g + l2·x)."""
    return -(c.rate * (g + c.l2 * x))


@triton.jit
def momentum(g, x, buffer, c):
    """buffer = μ·buffer + (1 − dampening)·d, the first time d; u = −lr·buffer or Nesterov's."""
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
    """u = −lr·(sign(β₁·m + (1−β₁)·g) + decay·x); m = β₂·m + (1−β₂)·g."""
    mixed = c.beta1 * m + c.rest1 * g
    sign = (mixed > 0).to(m.dtype) - (mixed < 0).to(m.dtype)
    return -(c.rate * sign) - c.decay * x, c.beta2 * m + c.rest2 * g
