"""Mechanic in plain PyTorch, in the paper's letters: the definition of correct.

Every other backend has the same functions and must agree with these. Elementwise arithmetic is in
float32 (float64 for float64 weights) with one rounding an operation, so that backends which do not
contract a·b + c agree to the bit; sums are of float64 products.

Source: arXiv 2306.00144, Algorithm 1; the variants are those of the authors' packages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bases import HYPER
from .bucket import GD, GG, XD, XX, Bucket
from .tuner import Tuner

PIECE = 1 << 22
"""Elements that ``shift`` and ``square`` work on at a time."""

WORD = 0xFFFFFFFF
"""The bits that a 32-bit number keeps."""


@dataclass(frozen=True)
class Coefficients:
    """What an update needs beside registers: hyperparameters and bias corrections, as numbers."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    l2: float
    decay: float
    nesterov: bool
    fresh: bool
    correction1: float
    correction2: float


def coefficients(hyper: list[float], step: float) -> Coefficients:
    """Return the coefficients of a weight's update number ``step`` + 1."""
    lr, beta1, beta2, eps, l2, decay, nesterov, _ = hyper
    t = step + 1
    return Coefficients(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        l2=l2,
        decay=decay,
        nesterov=bool(nesterov),
        fresh=step == 0,
        correction1=1 - beta1**t,
        correction2=1 / math.sqrt(1 - beta2**t),
    )


def plus(a: Tensor, c: float, x: Tensor) -> Tensor:
    """a + c·x, or a where c = 0: a weight that is infinite then spoils nothing."""
    return a + c * x if c else a


def sgd(g: Tensor, x: Tensor, c: Coefficients) -> tuple[Tensor]:
    """u = −lr·(g + l2·x)."""
    return (-(c.lr * plus(g, c.l2, x)),)


def momentum(g: Tensor, x: Tensor, buffer: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    """buffer = μ·buffer + (1 − dampening)·d, the first time d; u = −lr·buffer, or Nesterov's."""
    d = plus(g, c.l2, x)
    buffer = c.beta1 * buffer + (1.0 if c.fresh else 1 - c.beta2) * d
    return -(c.lr * (d + c.beta1 * buffer if c.nesterov else buffer)), buffer


def adam(
    g: Tensor, x: Tensor, m: Tensor, v: Tensor, c: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """u = −(lr/(1−β₁ᵗ))·m / (√v/√(1−β₂ᵗ) + ε) − lr·decay·x, as torch's Adam and AdamW."""
    g = plus(g, c.l2, x)
    m = c.beta1 * m + (1 - c.beta1) * g
    v = c.beta2 * v + (1 - c.beta2) * (g * g)
    # By way of float64, since torch's float32 square root is not always the nearest one on CPUs.
    root = v.double().sqrt().to(v.dtype)
    direction = (c.lr / c.correction1 * m) / (root * c.correction2 + c.eps)
    return plus(-direction, -(c.lr * c.decay), x), m, v


def lion(g: Tensor, x: Tensor, m: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    """u = −lr·(sign(β₁·m + (1−β₁)·g) + decay·x); m = β₂·m + (1−β₂)·g. Source: arXiv 2302.06675."""
    direction = (c.beta1 * m + (1 - c.beta1) * g).sign()
    return plus(-(c.lr * direction), -(c.lr * c.decay), x), c.beta2 * m + (1 - c.beta2) * g


UPDATES: dict[str, Any] = {"sgd": sgd, "momentum": momentum, "adam": adam, "lion": lion}


def prepare(bucket: Bucket) -> None:
    """Nothing: this backend reads the tensors themselves, not the tables."""


def clip_coefficient(clip: Tensor) -> float:
    """Return min(1, max_norm/(N + 1e-6)) of (N², max_norm), as torch's clip_grad_norm_ does."""
    squares, max_norm = clip.tolist()
    c = max_norm / (math.sqrt(squares) + 1e-6)
    return c if c < 1 else 1.0


def multipliers(bucket: Bucket, clips: bool = True) -> list[float]:
    """Return what each weight's gradient is multiplied by: −1 to maximize, over GradScaler's scale,
    times the coefficient of clipping."""
    c = clip_coefficient(bucket.clip) if clips and bucket.clip is not None else 1.0
    column = HYPER.index("gradient")
    return [bucket.hyper_rows[group][column] * c for group in bucket.groups]


def norm(bucket: Bucket) -> None:
    """sums[:, 2] = g·g over the elements that are finite, one row a scale, before any clipping."""
    bucket.sums[:, GG] = 0
    by = multipliers(bucket, clips=False)
    for i, g in enumerate(bucket.grads):
        if g is not None:
            g = g.to(bucket.wide) * by[i]
            g = torch.where(g.isfinite(), g, 0.0).double()
            bucket.sums[bucket.rows[i], GG] += (g * g).sum()


def inner_products(bucket: Bucket) -> None:
    """sums[:, 0] = g·Δ and sums[:, 2] = g·g, one row a scale, g as it is (NaN and inf included)."""
    bucket.sums[:, [GD, GG]] = 0
    by = multipliers(bucket)
    for i, g in enumerate(bucket.grads):
        if g is not None:
            g = (g.to(bucket.wide) * by[i]).double()
            row = bucket.sums[bucket.rows[i]]
            row[GD] += (g * bucket.delta[i].double()).sum()
            row[GG] += (g * g).sum()


def accumulate(bucket: Bucket) -> None:
    """Take the sums with the old Δ, then Δ += u with u from the base's update.

    A weight without a gradient is left as it is; an element that is not finite enters u as g = 0.
    Δ may be kept in bfloat16.
    """
    inner_products(bucket)
    update = UPDATES[bucket.kind]
    by = multipliers(bucket)
    for i, g in enumerate(bucket.grads):
        if g is None:
            continue
        x = bucket.weights[i].to(bucket.wide)
        g = g.to(bucket.wide) * by[i]
        g = torch.where(g.isfinite(), g, 0.0)
        states = bucket.states[i]
        c = coefficients(
            bucket.hyper_rows[bucket.groups[i]], float(bucket.steps[i]) if bucket.steps else 0.0
        )
        u, *moved = update(g, x, *(state.to(bucket.wide) for state in states), c)
        for state, new in zip(states, moved, strict=True):
            state.copy_(new)
        move_delta(bucket, i, u)
        if bucket.steps:
            bucket.steps[i].add_(1)


def move_delta(bucket: Bucket, i: int, u: Tensor) -> None:
    """Δ += u; in bfloat16 the sum is rounded up or down by the odds of where it lies between."""
    delta = bucket.delta[i]
    if not bucket.narrow_delta:
        delta.add_(u)
        return
    # Elements are counted as they lie in memory, whatever the order of the axes.
    element = torch.arange(delta.numel(), device=delta.device)
    bits = dither(seed(bucket.clock, bucket.numbers[i]), element)  # type: ignore[arg-type]
    bits = bits.as_strided(delta.shape, delta.stride())
    delta.copy_(rounded_by(bits, delta.to(bucket.wide) + u))


def scramble(n: Tensor) -> Tensor:
    """Return a hash of numbers below 2³², in which each bit depends on all: "lowbias32".

    Source: C. Wellons, Prospecting for Hash Functions, 2018.
    """
    n = (n ^ n >> 16) * 0x7FEB352D & WORD
    n = (n ^ n >> 15) * 0x846CA68B & WORD
    return n ^ n >> 16


def seed(steps: Tensor, number: int) -> Tensor:
    """Return what the random bits of weight ``number`` depend on, after so many steps."""
    return scramble(scramble(steps.long() & WORD) + number & WORD)


def dither(seed: Tensor, element: Tensor) -> Tensor:
    """Return 16 random bits for each element, which is its place in the weight's memory."""
    return scramble(element + seed & WORD) >> 16


def rounded_by(bits: Tensor, x: Tensor) -> Tensor:
    """Return float32 x in bfloat16: up in magnitude as often as what is cut off is of a last place.

    Args:
        bits: 16 random ones for each element.
    """
    cut = (x.view(torch.int32) + bits).to(torch.int32) & ~0xFFFF
    # Bits that are added to a NaN could make a number of it.
    return torch.where(x.isfinite(), cut.view(torch.float32), x).to(torch.bfloat16)


def tune(sums: Tensor, tuner: Tuner) -> None:
    """Learn from h = g·Δ + λ·S·√(g·g)/(√(x·x) + ε)·(x·Δ); one row a scale.

    A row whose sums or h are not finite keeps its state; the step is counted all the same. Where S
    anneals with the schedule, s takes a part of its move.

    Args:
        sums: (scales, 4) float64, over all parameters of each scale: g·Δ, x·Δ, g·g, x·x.
        tuner: its state is changed in place.
    """
    decay, s_init, eps, eps_in_m, clamps_h, floors_r, learning, pace = tuner.constants[:8].tolist()
    n = len(tuner.betas)
    beta = tuner.constants[8:]
    s, r, v, m = (tuner.part(i) for i in range(4))
    gd, xd, gg, xx = sums.unbind(1)
    h = gd + decay * tuner.scale() * gg.sqrt() / (xx.sqrt() + eps) * xd
    finite = sums.isfinite().all(1) & h.isfinite()
    h = h[:, None]

    reward_h = torch.maximum(torch.minimum(h, m), -m) if clamps_h else h
    m_new = torch.maximum(beta * m, h.abs() + (eps if eps_in_m else 0.0))
    v_new = beta * beta * v + h * h
    r_new = beta * r - reward_h * s
    if floors_r:
        r_new = r_new.clamp(min=0)
    s_new = (s_init / n * m_new + r_new.clamp(min=0)) / (v_new.sqrt() + eps)
    if pace < 1:
        s_new = s + pace * (s_new - s)

    if learning:
        for old, new in zip((s, r, v, m), (s_new, r_new, v_new, m_new), strict=True):
            old.copy_(torch.where(finite[:, None], new, old))
    tuner.counters[:, 0] += 1
    tuner.counters[0, 1] += (~finite).any()


def blend(x_ref: Tensor, delta: Tensor, s: Tensor) -> Tensor:
    """Return round(x_ref + S·Δ) in the weight's dtype; ``s`` is S in the dtype of arithmetic."""
    return (x_ref.to(s.dtype) + s * delta.to(s.dtype)).to(x_ref.dtype)


def apply(bucket: Bucket, tuner: Tuner) -> None:
    """x = round(x_ref + S·Δ); leaves x·Δ and x·x of the rounded x for the next step."""
    scale = tuner.scale().to(bucket.device)
    for i, x in enumerate(bucket.weights):
        s = scale[bucket.rows[i]].to(bucket.wide)
        x.copy_(blend(bucket.x_ref[i], bucket.delta[i], s))
    measure(bucket)


def measure(bucket: Bucket) -> None:
    """sums[:, 1] = x·Δ and sums[:, 3] = x·x, of x as it stands."""
    bucket.sums[:, [XD, XX]] = 0
    for i, x in enumerate(bucket.weights):
        row = bucket.sums[bucket.rows[i]]
        row[XD] += (x.double() * bucket.delta[i].double()).sum()
        row[XX] += (x.double() * x.double()).sum()


def square(x: Tensor) -> Tensor:
    """Return ‖x‖² in float64, without a copy of x at that width."""
    flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
    return torch.stack([part.double().square().sum() for part in flat.split(PIECE)]).sum()


def shift(bucket: Bucket, i: int, scale: Tensor) -> None:
    """Move x_ref by what somebody wrote to x since the last apply, so that x stays as it is.

    x_ref += x − round(x_ref + S·Δ), and exactly nothing where x is what apply wrote.
    """
    s = scale[bucket.rows[i]].to(bucket.wide)
    tensors = bucket.weights[i], bucket.x_ref[i], bucket.delta[i]
    if all(t.is_contiguous() for t in tensors):
        # The temporaries of a large embedding would be several times its own size.
        pieces = [t.view(-1).split(PIECE) for t in tensors]
        for x, x_ref, delta in zip(*pieces, strict=True):
            _shift(x, x_ref, delta, s)
    else:
        _shift(*tensors, s)


def _shift(x: Tensor, x_ref: Tensor, delta: Tensor, s: Tensor) -> None:
    wide = s.dtype
    # Where somebody has repaired a weight, a Δ that it had spoiled starts anew.
    delta.copy_(torch.where(delta.isfinite() | ~x.isfinite(), delta, 0.0))
    written = blend(x_ref, delta, s)
    moved = x_ref.to(wide) + (x.to(wide) - written.to(wide))
    # Where x had overflowed there is no difference to go by, but x itself tells.
    afresh = x.to(wide) - s * delta.to(wide)
    moved = torch.where(written.isfinite() & x_ref.isfinite(), moved, afresh)
    x_ref.copy_(torch.where(x == written, x_ref, moved.to(x_ref.dtype)))
