"""Every formula of a step, in PyTorch: tensors in, tensors out.

``csrc/formulas.h`` and ``triton_kernels/formulas.py`` state the same formulas under the same names.
Each operation rounds once, in float32 (float64 for float64 weights), so backends that do not
contract a·b + c agree to the bit.

Source: arXiv 2306.00144, Algorithm 1; the variants are those of the authors' packages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .layout import MOST_SCALE, XX, dtype_of_sums

UINT32_MAX = 0xFFFFFFFF


@dataclass(frozen=True)
class Coefficients:
    """The scalars of one update: hyperparameters and bias corrections."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    l2: float
    decay: float
    nesterov: bool
    is_first_update: bool
    correction1: float
    correction2: float


def coefficients(hyper: Sequence[float], step: float) -> Coefficients:
    """Return the coefficients of a weight's update number ``step`` + 1.

    Args:
        hyper: a row of ``layout.HYPER``.
        step: how many updates the weight has had.
    """
    lr, beta1, beta2, eps, l2, decay, nesterov, *_ = hyper
    t = step + 1
    return Coefficients(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        l2=l2,
        decay=decay,
        nesterov=bool(nesterov),
        is_first_update=step == 0,
        correction1=1 - beta1**t,
        correction2=1 / math.sqrt(1 - beta2**t),
    )


def peak_ratio(hyper: Sequence[float]) -> float:
    """Return the peak lr over lr, for a row of ``layout.HYPER``; 0 where lr is 0."""
    lr, peak_lr = hyper[0], hyper[-1]
    return peak_lr / lr if lr else 0.0


def clip_coefficient(squared_norm: float, max_norm: float) -> float:
    """Return min(1, max_norm/(N + 1e-6)), as torch's ``clip_grad_norm_`` does."""
    c = max_norm / (math.sqrt(squared_norm) + 1e-6)
    return c if c < 1 else 1.0


def finite_or_zero(g: Tensor) -> Tensor:
    """Return g with NaN and infinite elements replaced by 0."""
    return torch.where(g.isfinite(), g, 0.0)


def add_scaled(a: Tensor, c: float, x: Tensor) -> Tensor:
    """Return a + c·x, or a where c = 0, so that an infinite x cannot spoil the sum."""
    return a + c * x if c else a


def sgd(g: Tensor, x: Tensor, c: Coefficients) -> tuple[Tensor]:
    """u = −lr·(g + l2·x)."""
    return (-(c.lr * add_scaled(g, c.l2, x)),)


def momentum(g: Tensor, x: Tensor, buffer: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    """buffer = μ·buffer + (1 − dampening)·d, at first d; u = −lr·buffer, or Nesterov's."""
    d = add_scaled(g, c.l2, x)
    buffer = c.beta1 * buffer + (1.0 if c.is_first_update else 1 - c.beta2) * d
    return -(c.lr * (d + c.beta1 * buffer if c.nesterov else buffer)), buffer


def adam(
    g: Tensor, x: Tensor, m: Tensor, v: Tensor, c: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """u = −(lr/(1−β₁ᵗ))·m / (√v/√(1−β₂ᵗ) + ε) − lr·decay·x, as torch's Adam and AdamW."""
    g = add_scaled(g, c.l2, x)
    m = c.beta1 * m + (1 - c.beta1) * g
    v = c.beta2 * v + (1 - c.beta2) * (g * g)
    # By way of float64: torch's float32 square root is not always correctly rounded on CPUs.
    root = v.to(dtype_of_sums(v.device)).sqrt().to(v.dtype)
    direction = (c.lr / c.correction1 * m) / (root * c.correction2 + c.eps)
    return add_scaled(-direction, -(c.lr * c.decay), x), m, v


def lion(g: Tensor, x: Tensor, m: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    """u = −lr·(sign(β₁·m + (1−β₁)·g) + decay·x); m = β₂·m + (1−β₂)·g. Source: arXiv 2302.06675."""
    direction = (c.beta1 * m + (1 - c.beta1) * g).sign()
    return add_scaled(-(c.lr * direction), -(c.lr * c.decay), x), c.beta2 * m + (1 - c.beta2) * g


def muon_momentum(g: Tensor, buffer: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    """buffer = μ·buffer + (1−μ)·g; n = μ·buffer + (1−μ)·g, or without Nesterov buffer.

    Returns:
        n and the new buffer.
    """
    added = (1 - c.beta1) * g
    buffer = c.beta1 * buffer + added
    return c.beta1 * buffer + added if c.nesterov else buffer, buffer


def muon_update(d: Tensor, x: Tensor, c: Coefficients) -> Tensor:
    """u = −lr·(d + decay·x), as torch's Muon, where d = ratio·O."""
    return add_scaled(-(c.lr * d), -(c.lr * c.decay), x)


UPDATES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adam": adam,
    "lion": lion,
}
"""Kind → its update: (g, x, *states, coefficients) → (u, *new states)."""


def hash32(n: Tensor) -> Tensor:
    """Return the hash "lowbias32" of integers below 2³²; each bit depends on every input bit.

    Source: C. Wellons, Prospecting for Hash Functions, 2018.
    """
    n = (n ^ n >> 16) * 0x7FEB352D & UINT32_MAX
    n = (n ^ n >> 15) * 0x846CA68B & UINT32_MAX
    return n ^ n >> 16


def rounding_seed(step_count: Tensor, number: int) -> Tensor:
    """Return the seed of the random bits of weight ``number`` after ``step_count`` steps."""
    return hash32(hash32(step_count.long() & UINT32_MAX) + number & UINT32_MAX)


def random_bits16(seed: Tensor, element: Tensor) -> Tensor:
    """Return 16 random bits for each element, given its index in the weight's storage."""
    return hash32(element + seed & UINT32_MAX) >> 16


def stochastic_round(bits: Tensor, x: Tensor) -> Tensor:
    """Round float32 x to bfloat16, away from 0 with probability equal to the discarded fraction.

    Args:
        bits: 16 random bits for each element.
    """
    cut = (x.view(torch.int32) + bits).to(torch.int32) & ~0xFFFF
    # Adding bits to a NaN could turn it into a number.
    return torch.where(x.isfinite(), cut.view(torch.float32), x).to(torch.bfloat16)


def join(x: Tensor, low: Tensor) -> Tensor:
    """Return the float32 numbers that are kept as 16-bit numbers and 16 low bits beside them.

    Whoever writes the 16-bit number alone moves the float32 one by less than half its last place,
    and a 0 that is written stays 0.

    Args:
        x: bfloat16, the upper half of a float32, or float16.
        low: int16: of a bfloat16 the lower half, counted from x, which is the nearest one; of a
            float16 2⁻¹⁶ths of the last place of x.
    """
    wide = x.float()
    if x.dtype is torch.float16:
        return wide + low.float() * _low_unit(wide)
    bits = wide.view(torch.int32)
    joined = (bits + low.to(torch.int32)).view(torch.float32)
    return torch.where((wide == 0) | ~wide.isfinite(), wide, joined)


def split(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the nearest 16-bit numbers, ties away from 0 for bfloat16, and the low bits."""
    if dtype is torch.float16:
        x = wide.to(dtype)
        rest = ((wide - x.float()) / _low_unit(x.float())).clamp(-32767, 32767)
        away = torch.where(rest < 0, rest - 0.5, rest + 0.5)
        return x, torch.where(rest.isnan(), 0.0, away).to(torch.int32).to(torch.int16)
    bits = wide.view(torch.int32)
    nearest = torch.where(wide.isnan(), bits | 0x7FC00000, bits + 0x8000) & ~0xFFFF
    return nearest.view(torch.float32).to(dtype), bits.to(torch.int16)


def _low_unit(x: Tensor) -> Tensor:
    """Return 2⁻¹⁶ of the last place of a float16, float32."""
    exponent = (x.view(torch.int32) >> 23 & 0xFF).clamp(min=113) - 26
    return (exponent << 23).to(torch.int32).view(torch.float32)


def apply_update(x: Tensor, s: Tensor, u: Tensor) -> Tensor:
    """Return x + S·u; ``s`` is S in the dtype of arithmetic."""
    return x + s * u


def apply_scale(x_ref: Tensor, s: Tensor, delta: Tensor) -> Tensor:
    """Return round(x_ref + S·Δ) in the weight's dtype; ``s`` is S in the dtype of arithmetic."""
    return (x_ref.to(s.dtype) + s * delta.to(s.dtype)).to(x_ref.dtype)


def total_scale(s: Tensor) -> Tensor:
    """Return S = Σ s, (scales,), summed in the order of the tuner betas."""
    return reduce(torch.add, s.unbind(1)).clone()


def tuner_h(sums: Tensor, scale: Tensor, decay: float, eps: float) -> Tensor:
    """Return h = g·Δ + λ·S·√(g·g)/(√(x·x) + ε)·(x·Δ), (scales,).

    Args:
        sums: (scales, 6) float64, the columns of ``layout.SUMS``.
        scale: S, (scales,).
        decay: λ.
        eps: ε.
    """
    gd, xd, gg, xx = sums[:, : XX + 1].unbind(1)
    return gd + decay * scale * gg.sqrt() / (xx.sqrt() + eps) * xd


def tuner_update(
    h: Tensor, s: Tensor, r: Tensor, v: Tensor, m: Tensor, beta: Tensor, constants: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the new (s, r, v, m), each (scales, betas).

    ĥ = clamp(h, −m, m) or h;  m = max(β·m, |h| + ε or |h|);  v = β²·v + h²;  r = β·r − ĥ·s, clamped
    at 0 in some variants;  s = ((s_init/n)·m + max(0, r))/(√v + ε), or a fraction of that move.

    Args:
        h: (scales, 1).
        beta: (betas,).
        constants: the columns of ``layout.CONSTANTS``.
    """
    _, s_init, eps, eps_in_m, clamps_h, floors_r, _, annealing_factor = constants
    reward_h = torch.maximum(torch.minimum(h, m), -m) if clamps_h else h
    m_new = torch.maximum(beta * m, h.abs() + (eps if eps_in_m else 0.0))
    v_new = beta * beta * v + h * h
    r_new = beta * r - reward_h * s
    if floors_r:
        r_new = r_new.clamp(min=0)
    s_new = (s_init / len(beta) * m_new + r_new.clamp(min=0)) / (v_new.sqrt() + eps)
    if annealing_factor < 1:
        s_new = s + annealing_factor * (s_new - s)
    return s_new, r_new, v_new, m_new


@dataclass
class LogRow:
    """A row of the log tuner's state: ``layout.LOG_TUNER``."""

    scale: float
    mean_square: float
    moves: float
    steps: float
    nonfinite: float
    informed: float
    learns: float
    weight: float
    ln_update: float
    ln_ratio: float
    start_ratio: float
    start: float
    anchors: float
    ln_anchor: float
    factor: float
    peak_rate: float


@dataclass(frozen=True)
class LogConstants:
    """The log tuner's constants: ``layout.LOG_CONSTANTS``."""

    tunes_scale: float
    factor: float
    norm_share: float
    anchor_share: float
    loss_range: float
    least_rms: float
    average: float
    held: float
    gain: float
    max_move: float
    bias: float
    outlier: float
    memory: float
    ceiling: float
    norm_ceiling: float
    regrowth: float


@dataclass(frozen=True)
class ScaleSums:
    """A row of the sums: ``layout.SUMS``."""

    gd: float
    xd: float
    gg: float
    xx: float
    uu: float
    count: float


@dataclass(frozen=True)
class WholeModel:
    """What all scales have in common: ‖g‖·‖u‖, the number of elements, the loss of this step."""

    power: float
    size: float
    loss: float


def mean_loss(losses: Sequence[float]) -> float:
    """Return the mean of the observed losses, of ``layout.LOSSES``; 0 where there is none."""
    total, count = losses
    return total / count if count > 0 else 0.0


def norm_estimate(sums: ScaleSums, model: WholeModel, row: LogRow, c: LogConstants) -> float:
    """S with S·‖u‖ = norm_share·‖x‖/∛n: the more elements (n), the less each may move.

    ‖u‖ is a geometric mean over the last steps, as is ‖u‖/‖g‖.
    """
    norm = max(math.sqrt(sums.xx), c.least_rms * math.sqrt(sums.count))
    row.weight += (1 - row.weight) / c.average
    ln_update, memory = 0.5 * math.log(sums.uu), c.average * row.weight
    row.ln_update += (ln_update - row.ln_update) / memory
    row.ln_ratio += (ln_update - 0.5 * math.log(sums.gg) - row.ln_ratio) / memory
    return c.norm_share * norm * math.exp(-row.ln_update - math.log(model.size) / 3)


def loss_estimate(row: LogRow, c: LogConstants) -> float:
    """S with S·‖g‖·‖u‖ = anchor_share·loss, geometric means over the steps so far; 0: unknown."""
    # No float64 is larger than the exponential of 709.
    return c.anchor_share * math.exp(min(row.ln_anchor, 709.0)) if row.anchors > 0 else 0.0


def joint_estimate(by_loss: float, norm: float, c: LogConstants) -> float:
    """The geometric mean of the two; by the loss it counts within a factor of that by norms.

    Args:
        by_loss: 0: unknown.
    """
    if by_loss == 0:
        return norm
    return math.sqrt(min(max(by_loss, norm / c.loss_range), c.loss_range * norm) * norm)


def estimate_scale(sums: ScaleSums, model: WholeModel, row: LogRow, c: LogConstants) -> None:
    """Set S where a run starts, between two estimates.

    A step lowers the loss by no more than a share of it, by Cauchy and Schwarz; and a step is a
    share of the weights' norm. Without a loss (not above 0, not finite) the latter alone. A scale
    that is there before any estimate is the user's and stays.
    """
    row.factor = max(row.factor, c.factor)
    if row.weight == 0 and row.scale > 0:
        return
    norm = norm_estimate(sums, model, row, c)
    row.start_ratio = row.ln_ratio
    if 0 < model.loss < math.inf and 0 < model.power < math.inf:
        row.anchors += 1
        decrease = math.log(model.loss) - math.log(model.power)
        row.ln_anchor += (decrease - row.ln_anchor) / row.anchors
    row.scale = row.start = min(joint_estimate(loss_estimate(row, c), norm, c), MOST_SCALE)


def log_tuner_update(h: float, row: LogRow, c: LogConstants) -> None:
    """z = clamp(−h/√v, −1, 1);  ln S += min(max_move, gain/(t + 1))·(z + bias).

    v is a mean square of h over the later steps; one h counts at most ``outlier``·√v.

    Args:
        h: g·(x − x_ref).
    """
    limit = c.outlier * math.sqrt(row.mean_square)
    if limit > 0:
        h = max(min(h, limit), -limit)
    row.mean_square += (h * h - row.mean_square) / (1 + row.moves / c.memory)
    row.moves += 1
    if row.mean_square > 0:
        z = max(min(-h / math.sqrt(row.mean_square), 1.0), -1.0)
        row.scale *= math.exp(min(c.max_move, c.gain / (row.informed + 1)) * (z + c.bias))


def learn_scale(
    sums: ScaleSums, model: WholeModel, rises: bool, row: LogRow, c: LogConstants
) -> None:
    """Let S learn from h within bounds.

    S·lr does not grow above a multiple of where it started, or of more where the base has since
    come to make less of a gradient, as Adagrad does; without a loss, of the estimate by the norms
    as they are now. Where a schedule rises again it stays below a multiple of what it has been.

    Args:
        rises: whether the lr has risen since the last step.
    """
    if not row.learns and row.weight > 0 and c.factor < row.factor:
        # The lr has risen to a fraction of the peak that the estimate was for, and falls.
        row.scale /= row.factor
    row.learns, row.factor, before = 1.0, c.factor, row.scale
    log_tuner_update(sums.gd, row, c)
    if row.weight > 0:
        norm = norm_estimate(sums, model, row, c)
        shrunk = math.exp(min(max(row.start_ratio - row.ln_ratio, 0.0), 709.0))
        ceiling = c.ceiling * row.start * shrunk if row.anchors > 0 else c.norm_ceiling * norm
        row.scale = min(row.scale, max(before, ceiling / c.factor))
    if rises and row.peak_rate > 0:
        row.scale = min(row.scale, c.regrowth * row.peak_rate / c.factor)


def log_tune_row(sums: ScaleSums, model: WholeModel, row: LogRow, c: LogConstants) -> bool:
    """Update one row of the log tuner's state; return whether its sums were finite.

    While the lr rises to its peak, and in the first steps, S is an estimate; then it learns.
    """
    row.steps += 1
    if not all(map(math.isfinite, (sums.gd * sums.gd, sums.gg, sums.xx, sums.uu))):
        return False
    stays = not c.tunes_scale and row.scale > 0
    if stays or not (sums.gg > 0 and sums.uu > 0):
        return True
    rises = c.factor > row.factor * (1 + 1e-6)  # and not by a rounding
    row.informed += 1
    if not row.learns and (rises or row.informed <= c.held):
        estimate_scale(sums, model, row, c)
        row.peak_rate = max(row.peak_rate, row.scale)
    else:
        learn_scale(sums, model, rises, row, c)
        row.peak_rate = max(row.peak_rate, row.scale * c.factor)
    return True


def step_along(w: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return w − c·d in the dtype of d."""
    return w.to(d.dtype) - c.to(d.dtype) * d


def adarem(g: Tensor, x: Tensor, m: Tensor, gain: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """b = sign(g)·m/(max|m| + ε);  u = −lr·((1 + λᵗ·b)·g + decay·x);  m = β·m + (1−β)·g.

    Args:
        gain: λᵗ/(max|m| + ε), 0-dim.
        options: ``vectors.reference.AdaRemOptions``.

    Returns:
        u and the new m.
    """
    adjusted = (1 + gain * (g.sign() * m)) * g
    u = -(options.lr * (adjusted + options.decay * x))
    return u, options.beta * m + (1 - options.beta) * g
