"""The ops in plain PyTorch: the definition of correct.

Every other backend has the same functions and must agree with these. Elementwise results agree to
the bit as long as S does; sums are of float64 products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kept_blocks import WHOLE, keep
from ..param_checks import is_dense
from . import formulas, quantize
from .layout import COUNT, CPU_CHUNK, GD, GG, HYPER, REFERENCE_EVERY, UU, XD, XX, dtype_of_sums

if TYPE_CHECKING:
    from ..bucket import Bucket
    from ..log_tuner import LogTuner
    from ..tuner import Tuner

CHUNK = {"cpu": CPU_CHUNK, "cuda": CPU_CHUNK}
"""Device → elements of a chunk. No op here reads the chunk table."""

COPIES_TABLES = False

PIECE = 1 << 22
"""Elements that ``squared_norm`` and ``shift_reference`` widen at a time."""


def prepare(bucket: Bucket) -> None:
    """Do nothing: this backend reads the tensors themselves, not the tables."""


def gradient_multipliers(bucket: Bucket, clips: bool = True) -> list[float]:
    """Return the factor of each weight's gradient.

    −1 to maximize, over GradScaler's scale, times the clipping coefficient.
    """
    c = 1.0
    if clips and bucket.clip is not None:
        c = formulas.clip_coefficient(*bucket.clip.tolist())
    column = HYPER.index("gradient")
    return [bucket.hyper_rows[group][column] * c for group in bucket.groups]


def norm(bucket: Bucket) -> None:
    """sums[:, GG] = g·g over the finite elements, before any clipping."""
    bucket.sums[:, GG] = 0
    factors = gradient_multipliers(bucket, clips=False)
    for i, g in enumerate(bucket.grads):
        if g is not None:
            g = formulas.finite_or_zero(g.to(bucket.compute_dtype) * factors[i])
            g = g.to(bucket.sums.dtype)
            bucket.sums[bucket.rows[i], GG] += (g * g).sum()


def inner_products(bucket: Bucket) -> None:
    """sums[:, GD] = g·Δ and sums[:, GG] = g·g, including elements that are NaN or infinite."""
    bucket.sums[:, GD] = bucket.sums[:, GG] = 0
    wide = bucket.sums.dtype
    factors = gradient_multipliers(bucket)
    for i, g in enumerate(bucket.grads):
        if g is not None:
            g = (g.to(bucket.compute_dtype) * factors[i]).to(wide)
            row = bucket.sums[bucket.rows[i]]
            row[GD] += (g * read_delta(bucket, i).to(wide)).sum()
            row[GG] += (g * g).sum()


def accumulate(bucket: Bucket) -> None:
    """Take the sums with the old Δ, then Δ += u, where u is the base's update.

    A weight without a gradient is left unchanged; u takes g = 0 where an element is not finite.
    """
    inner_products(bucket)
    factors = gradient_multipliers(bucket)
    dtype = bucket.compute_dtype
    for i, g in enumerate(bucket.grads):
        if g is not None:
            u = base_update(bucket, i, g.to(dtype) * factors[i], bucket.weights[i].to(dtype))
            add_to_delta(bucket, i, u)


def base_update(bucket: Bucket, i: int, g: Tensor, x: Tensor) -> Tensor:
    """Return the base's update u of weight i, and move its state; g is 0 where not finite."""
    states = read_states(bucket, i)
    step = float(bucket.steps[i]) if bucket.steps else 0.0
    c = formulas.coefficients(bucket.hyper_rows[bucket.groups[i]], step)
    update = formulas.UPDATES[bucket.kind]
    u, *moved = update(formulas.finite_or_zero(g), x, *states, c)
    write_states(bucket, i, moved)
    if bucket.steps:
        bucket.steps[i].add_(1)
    return u


def read_states(bucket: Bucket, i: int) -> list[Tensor]:
    """Return the base's state of weight i in the dtype of arithmetic."""
    if not bucket.state_block:
        return [state.to(bucket.compute_dtype) for state in bucket.states[i]]
    return [
        _decoded(bucket, q, scale)
        for q, scale in zip(bucket.states[i], bucket.scales[i], strict=True)
    ]


def read_delta(bucket: Bucket, i: int) -> Tensor:
    """Return Δ of weight i: itself, or numbers for codes."""
    delta = bucket.delta[i]
    return _decoded(bucket, delta, bucket.delta_scales[i]) if bucket.delta_scales else delta


def _decoded(bucket: Bucket, q: Tensor, scale: Tensor) -> Tensor:
    codes, block = quantize.FORMATS[q.dtype], bucket.state_block
    return quantize.dequantize(q.view(-1, block), scale.view(-1), codes).view(q.shape)


def write_states(bucket: Bucket, i: int, moved: Sequence[Tensor]) -> None:
    """Store the base's state of weight i as its format says.

    Codes are rounded by bits that depend on the step and the element, and so is a v in bfloat16,
    which could not fall otherwise; other 16-bit states are rounded to nearest.
    """
    states = bucket.states[i]
    v_is_bfloat16 = len(states) > 1 and states[1].dtype is torch.bfloat16
    if not bucket.state_block and not v_is_bfloat16:
        for state, new in zip(states, moved, strict=True):
            state.copy_(new)
        return
    if v_is_bfloat16:
        states[0].copy_(moved[0])
        bits = element_bits(bucket, i, quantize.UNSIGNED.stride)
        states[1].copy_(formulas.stochastic_round(bits >> 16, moved[1]))
        return
    for q, scale, new in zip(states, bucket.scales[i], moved, strict=True):
        write_codes(bucket, i, q, scale, new)


def write_codes(bucket: Bucket, i: int, q: Tensor, scale: Tensor, new: Tensor) -> None:
    """Store numbers of weight i as codes, rounded by bits of the step and the element."""
    codes = quantize.FORMATS[q.dtype]
    xi = quantize.fraction(element_bits(bucket, i, codes.stride))
    of_blocks, xi = (t.reshape(-1, bucket.state_block) for t in (new, xi))
    found, scales = quantize.quantize(of_blocks, xi, codes)
    q.copy_(found.view(q.shape))
    scale.copy_(scales.view(scale.shape))


def element_bits(bucket: Bucket, i: int, stride: int) -> Tensor:
    """Return the bits by which each element of weight i is rounded, in its layout.

    Args:
        stride: of what is rounded, see ``quantize.rounding_bits``.
    """
    x, steps = bucket.weights[i], bucket.step_count
    assert steps is not None
    # Elements are numbered by storage order, whatever the order of the axes.
    element = torch.arange(x.numel(), device=x.device) + bucket.elements[i]
    bits = quantize.rounding_bits(bucket.numbers[i], steps, element, stride)
    # A weight whose storage has gaps is numbered by its axes.
    return bits.as_strided(x.shape, x.stride()) if is_dense(x) else bits.view(x.shape)


def step(bucket: Bucket, tuner: LogTuner) -> None:
    """Take the sums with the x before the step, move the base's state, and x += S·u.

    A weight without a gradient is left unchanged; u takes g = 0 where an element is not finite.
    """
    bucket.sums.zero_()
    factors, scale = gradient_multipliers(bucket), scale_near(bucket, tuner.scale())
    for i, g in enumerate(bucket.grads):
        if g is not None:
            g = g.to(bucket.compute_dtype) * factors[i]
            x = read_weight(bucket, i)
            add_gradient_sums(bucket, i, g, x)
            move_weight(bucket, i, x, base_update(bucket, i, g, x), scale)


def muon_momentum(bucket: Bucket, n: Tensor) -> None:
    """Take the sums with the x before the step, move the momentum, and leave n.

    A weight without a gradient is left unchanged; n takes g = 0 where an element is not finite.

    Args:
        bucket: weights of one shape.
        n: (weights, …), each laid out as its weight.
    """
    bucket.sums.zero_()
    factors = gradient_multipliers(bucket)
    for i, g in enumerate(bucket.grads):
        if g is not None:
            g = g.to(bucket.compute_dtype) * factors[i]
            add_gradient_sums(bucket, i, g, read_weight(bucket, i))
            c = formulas.coefficients(bucket.hyper_rows[bucket.groups[i]], 0.0)
            [buffer] = read_states(bucket, i)
            direction, moved = formulas.muon_momentum(formulas.finite_or_zero(g), buffer, c)
            write_states(bucket, i, [moved])
            n[i].copy_(direction)


def muon_update(bucket: Bucket, o: Tensor, ratio: float, tuner: LogTuner) -> None:
    """x += S·u of O, and the sum of u·u.

    Args:
        bucket: as of :func:`muon_momentum`.
        o: (weights, …), each laid out as its weight.
        ratio: what O is multiplied by.
        tuner: has S.
    """
    scale = scale_near(bucket, tuner.scale())
    for i, g in enumerate(bucket.grads):
        if g is not None:
            x = read_weight(bucket, i)
            c = formulas.coefficients(bucket.hyper_rows[bucket.groups[i]], 0.0)
            u = formulas.muon_update(o[i].to(bucket.compute_dtype) * ratio, x, c)
            move_weight(bucket, i, x, u, scale)


def read_weight(bucket: Bucket, i: int) -> Tensor:
    """Return weight i in the dtype of arithmetic: itself, or a 16-bit one with its low bits."""
    x = bucket.weights[i]
    return formulas.join(x, bucket.x_low[i]) if bucket.x_low else x.to(bucket.compute_dtype)


def add_gradient_sums(bucket: Bucket, i: int, g: Tensor, x: Tensor) -> None:
    """Add g·(x − x_ref), g·g and x·x of weight i, including elements that are not finite.

    Where one block in eight has an x_ref, its g·(x − x_ref) stands for eight.
    """
    wide = bucket.sums.dtype
    wide_g, wide_x = g.to(wide), x.to(wide)
    row = bucket.sums[bucket.rows[i]]
    x_ref, phase = bucket.x_ref[i].to(x.dtype), bucket.phases[i]
    if phase == WHOLE:
        row[GD] += (wide_g * (x - x_ref).to(wide)).sum()
    else:
        kept_g, kept_x = (keep(t, bucket.weights[i], phase) for t in (g, x))
        row[GD] += REFERENCE_EVERY * (kept_g.to(wide) * (kept_x - x_ref).to(wide)).sum()
    row[GG] += (wide_g * wide_g).sum()
    row[XX] += (wide_x * wide_x).sum()
    row[COUNT] += g.numel()


def move_weight(bucket: Bucket, i: int, x: Tensor, u: Tensor, scale: Tensor) -> None:
    """x += S·u for weight i, and add u·u at the peak lr to the sums.

    Args:
        x: the weight before the step, in the dtype of arithmetic.
        scale: from :func:`scale_near`.
    """
    row = bucket.rows[i]
    to_peak = formulas.peak_ratio(bucket.hyper_rows[bucket.groups[i]])
    wide_u = u.to(bucket.sums.dtype)
    bucket.sums[row, UU] += (wide_u * wide_u).sum() * (to_peak * to_peak)
    moved = formulas.apply_update(x, scale[row], u)
    if bucket.x_low:
        nearest, low = formulas.split(moved, bucket.dtype)
        bucket.weights[i].copy_(nearest)
        bucket.x_low[i].copy_(low)
    elif bucket.dtype is torch.bfloat16:
        bits = element_bits(bucket, i, quantize.WEIGHT_STRIDE)
        bucket.weights[i].copy_(formulas.stochastic_round(bits >> 16, moved))
    else:
        bucket.weights[i].copy_(moved)


def scale_near(bucket: Bucket, scale: Tensor) -> Tensor:
    """Return the S of all rows as arithmetic with the weights takes it, (scales,)."""
    return scale.to(bucket.compute_dtype).to(bucket.device)


def add_to_delta(bucket: Bucket, i: int, u: Tensor) -> None:
    """Δ += u for weight i; in codes and in bfloat16 the sum is rounded by bits of its own."""
    delta = bucket.delta[i]
    if bucket.delta_scales:
        write_codes(bucket, i, delta, bucket.delta_scales[i], read_delta(bucket, i) + u)
        return
    if not bucket.delta_is_bfloat16:
        delta.add_(u)
        return
    # Elements are numbered by storage order, whatever the order of the axes.
    element = torch.arange(delta.numel(), device=delta.device) + bucket.elements[i]
    seed = formulas.rounding_seed(bucket.step_count, bucket.numbers[i])  # type: ignore[arg-type]
    bits = formulas.random_bits16(seed, element).as_strided(delta.shape, delta.stride())
    delta.copy_(formulas.stochastic_round(bits, delta.to(bucket.compute_dtype) + u))


def tune(sums: Tensor, tuner: Tuner) -> None:
    """Update s, r, v, m of every scale from its sums.

    A row keeps its state where its sums or h are not finite; the step is counted all the same.

    Args:
        sums: (scales, 6) float64, over all weights of each scale.
        tuner: its state changes in place.
    """
    constants = tuner.constants[: -len(tuner.betas)].tolist()
    decay, _, eps, *_, tunes_scale, _ = constants
    h = formulas.tuner_h(sums, tuner.scale(), decay, eps)
    finite = sums.isfinite().all(1) & h.isfinite()
    state = tuner.s, tuner.r, tuner.v, tuner.m
    beta = tuner.constants[-len(tuner.betas) :]
    if tunes_scale:
        fresh = formulas.tuner_update(h[:, None], *state, beta, constants)
        for old, new in zip(state, fresh, strict=True):
            old.copy_(torch.where(finite[:, None], new, old))
    tuner.counters[:, 0] += 1
    tuner.counters[0, 1] += (~finite).any()


def log_tune(sums: Tensor, tuner: LogTuner) -> None:
    """Update every row of the log tuner's state from its sums, and forget the observed losses.

    Args:
        sums: (scales, 6) float64, over all weights of each scale.
        tuner: its state changes in place.
    """
    constants = formulas.LogConstants(*tuner.constants.tolist())
    rows = [formulas.LogRow(*row) for row in tuner.state.tolist()]
    of_scales = [formulas.ScaleSums(*row) for row in sums.tolist()]
    gg, uu, size = (sum(getattr(s, name) for s in of_scales) for name in ("gg", "uu", "count"))
    loss = formulas.mean_loss(tuner.losses.tolist())
    model = formulas.WholeModel(math.sqrt(gg) * math.sqrt(uu), size, loss)
    finite = [
        formulas.log_tune_row(s, model, row, constants)
        for s, row in zip(of_scales, rows, strict=True)
    ]
    rows[0].nonfinite += not all(finite)
    tuner.state.copy_(
        torch.tensor([list(vars(row).values()) for row in rows], dtype=torch.float64, device="cpu")
    )
    tuner.losses.zero_()


def apply(bucket: Bucket, tuner: Tuner) -> None:
    """x = round(x_ref + S·Δ); leaves x·Δ and x·x of the rounded x for the next step."""
    scale = scale_near(bucket, tuner.scale())
    for i, x in enumerate(bucket.weights):
        s = scale[bucket.rows[i]]
        x.copy_(formulas.apply_scale(bucket.x_ref[i], s, read_delta(bucket, i)))
    measure(bucket)


def measure(bucket: Bucket) -> None:
    """sums[:, XD] = x·Δ and sums[:, XX] = x·x of the weights as they are."""
    bucket.sums[:, XD] = bucket.sums[:, XX] = 0
    for i, x in enumerate(bucket.weights):
        row = bucket.sums[bucket.rows[i]]
        wide_x = x.to(bucket.sums.dtype)
        row[XD] += (wide_x * read_delta(bucket, i).to(wide_x)).sum()
        row[XX] += (wide_x * wide_x).sum()


def squared_norm(x: Tensor) -> Tensor:
    """Return ‖x‖² in float64, where the device has it, without a float64 copy of x."""
    flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
    wide = dtype_of_sums(x.device)
    return torch.stack([piece.to(wide).square().sum() for piece in flat.split(PIECE)]).sum()


def shift_reference(bucket: Bucket, i: int, scale: Tensor) -> None:
    """Shift x_ref by what was written to x since the last ``apply``, so that x keeps its value.

    x_ref += x − round(x_ref + S·Δ), and exactly nothing where x is what ``apply`` wrote.
    """
    s = scale_near(bucket, scale)[bucket.rows[i]]
    whole = read_delta(bucket, i)
    tensors = bucket.weights[i], bucket.x_ref[i], whole
    if all(t.is_contiguous() for t in tensors):
        # In pieces: the temporaries of a large embedding would be several times its own size.
        pieces = [t.view(-1).split(PIECE) for t in tensors]
        for x, x_ref, delta in zip(*pieces, strict=True):
            _shift_piece(x, x_ref, delta, s)
    else:
        _shift_piece(*tensors, s)
    if bucket.delta_scales:
        # What was not finite may have been dropped.
        q = bucket.delta[i]
        q.masked_fill_((q == quantize.LINEAR.not_a_number) & ~whole.isnan(), 0)


def _shift_piece(x: Tensor, x_ref: Tensor, delta: Tensor, s: Tensor) -> None:
    dtype = s.dtype
    # A weight that somebody has repaired also drops a Δ that had become NaN or infinite.
    delta.copy_(torch.where(delta.isfinite() | ~x.isfinite(), delta, 0.0))
    applied = formulas.apply_scale(x_ref, s, delta)
    shifted = x_ref.to(dtype) + (x.to(dtype) - applied.to(dtype))
    # Where x had overflowed the difference says nothing; then x alone determines x_ref.
    from_x = x.to(dtype) - s * delta.to(dtype)
    shifted = torch.where(applied.isfinite() & x_ref.isfinite(), shifted, from_x)
    x_ref.copy_(torch.where(x == applied, x_ref, shifted.to(x_ref.dtype)))
