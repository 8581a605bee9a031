"""One step from whatever weights and state are there, in float64 and in numpy: the fuzzer's oracle.

Other oracles follow a run from its start. This one takes what it finds before a step, so events of
any kind may have come before, and bounds the rounding of each element by the terms it is made of.
"""

from __future__ import annotations

import numpy as np
import torch

from mechanic_fused.backends import quantize
from mechanic_fused.backends.layout import LOG_TUNER, SUMS
from mechanic_fused.kept_blocks import LEAST_ELEMENTS
from mechanic_fused.state_formats import has_codes

from .cases import SUM_RTOL
from .lockstep import displacement, joined
from .oracle import adam_direction

EPS = float(np.finfo(np.float32).eps)
"""Of the arithmetic beside weights of every dtype but float64, which has no place here."""

TINY = float(np.finfo(np.float32).tiny)
"""Smaller numbers may be taken for 0."""

LARGEST = {torch.float16: 6e4}
"""Of a weight's dtype; of the others 1e37."""

ENTRIES = ("exp_avg", "exp_avg_sq", "momentum_buffer", "delta")


BFLOAT16 = 2.0**-7
"""How far a number may be rounded in bfloat16, up or down, relative to it."""


def array(x):
    return x.detach().double().numpy()


def numbers(entries, name):
    """Return an entry of a state as numbers, and how far its storage may have rounded each."""
    t = entries[name]
    if not has_codes(name, t):
        found = array(t)
        return found, (BFLOAT16 * np.abs(found) if t.dtype is torch.bfloat16 else 0.0)
    scales = entries[f"{name}_scale"]
    codes = quantize.FORMATS[t.dtype]

    def of_count(count):
        wide = count.to(torch.int32).view(-1, t.numel() // scales.numel())
        return array(quantize.dequantize(wide, scales.view(-1), codes)).reshape(t.shape)

    # It lay between this code and one of its neighbours; of codes above the largest there is none.
    count = t.to(torch.int32).abs()
    size = of_count(count)
    gaps = [np.abs(of_count((count + k).clamp(min=0)) - size) for k in (-1, 1)]
    return of_count(t), np.maximum(*gaps)


class Weight:
    """A weight, its state and its options as a step finds them."""

    def __init__(self, opt, group, p, row):
        entries = opt.state.get(p, {})
        self.p, self.row, self.group, self.lr = p, row, group, float(group["lr"])
        self.x = array(joined(p, entries))
        self.is_whole = group.get("x_ref_every", 1) == 1 or p.numel() < LEAST_ELEMENTS
        self.moved = np.zeros_like(self.x)
        if "x_ref" in entries and self.is_whole:
            self.moved = array(displacement(opt, p, entries))
        self.steps = float(entries.get("step", 0))
        self.entries = {n: numbers(entries, n)[0] for n in ENTRIES if n in entries}
        self.g = None if p.grad is None else array(p.grad) * (-1 if group["maximize"] else 1)

    def entry(self, name):
        return self.entries.get(name, np.zeros_like(self.x))

    def update(self):
        """Return u, by how much it may be off, and the same of the state's entries."""
        g = np.where(np.isfinite(self.g), self.g, 0.0)
        if "momentum" in self.group:
            return self.sgd(g, **self.options("momentum", "dampening", "nesterov", "weight_decay"))
        if "eps" not in self.group:
            return self.lion(g, **self.options("betas", "weight_decay"))
        return self.adam(g, **self.options("betas", "eps", "weight_decay"))

    def options(self, *names):
        return {name: self.group[name] for name in names}

    def sgd(self, g, momentum, dampening, nesterov, weight_decay):
        d, size = g + weight_decay * self.x, np.abs(g) + weight_decay * np.abs(self.x)
        entries = {}
        if momentum:
            old = self.entry("momentum_buffer") * (self.steps > 0)
            rest = 1 - dampening if self.steps > 0 else 1.0
            buffer, off = momentum * old + rest * d, momentum * np.abs(old) + abs(rest) * size
            entries["momentum_buffer"] = buffer, 8 * EPS * off
            d = d + momentum * buffer if nesterov else buffer
            size = size + off
        return -self.lr * d, 12 * EPS * self.lr * size, entries

    def adam(self, g, betas, eps, weight_decay):
        b1, b2 = betas
        decoupled = self.group.get("decoupled_weight_decay", False)
        l2, decay = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
        before = {
            "t": self.steps,
            "m": self.entry("exp_avg"),
            "v": self.entry("exp_avg_sq"),
        }
        size = np.abs(g) + l2 * np.abs(self.x)
        m_off = 8 * EPS * (b1 * np.abs(before["m"]) + (1 - b1) * size) + TINY
        v_off = 12 * EPS * (b2 * before["v"] + (1 - b2) * size**2) + TINY
        state = dict(before)
        direction = adam_direction(g + l2 * self.x, state, betas, eps)
        correction = np.sqrt(1 - b2 ** state["t"])
        root = np.sqrt(state["v"])
        root_off = np.sqrt(state["v"] + v_off) - np.sqrt(np.maximum(state["v"] - v_off, 0))
        below = np.maximum((root - root_off) / correction + eps, eps)
        off = (m_off / (1 - b1 ** state["t"]) + np.abs(direction) * root_off / correction) / below
        u = -self.lr * (direction + decay * self.x)
        rounding = 12 * EPS * (np.abs(direction) + decay * np.abs(self.x))
        entries = {"exp_avg": (state["m"], m_off), "exp_avg_sq": (state["v"], v_off)}
        # The kernels multiply by the lr before they divide.
        return u, self.lr * (off + rounding) + TINY / below, entries

    def lion(self, g, betas, weight_decay):
        b1, b2 = betas
        m = self.entry("exp_avg")
        mixed, size = b1 * m + (1 - b1) * g, b1 * np.abs(m) + (1 - b1) * np.abs(g)
        # A sign that rounding decides may be any.
        unsure = (size > 0) & (np.abs(mixed) <= 8 * EPS * size + TINY)
        decay = weight_decay * self.x
        u = -self.lr * (np.sign(mixed) + decay)
        off = self.lr * (2.0 * unsure + 8 * EPS * (1 + np.abs(decay)))
        after = b2 * m + (1 - b2) * g, 8 * EPS * (b2 * np.abs(m) + (1 - b2) * np.abs(g))
        return u, off, {"exp_avg": after}


class SingleStep:
    """What the next step of an optimizer of a fused base must do.

    Args:
        opt: whose gradients have been given.
        scale_per: its option.
    """

    @np.errstate(all="ignore")  # elements that are out of range are left out
    def __init__(self, opt, scale_per):
        self.opt, self.weights = opt, []
        for number, group in enumerate(opt.param_groups):
            for p in group["params"]:
                row = {"model": 0, "group": number, "parameter": len(self.weights)}[scale_per]
                self.weights.append(Weight(opt, group, p, row))
        self.at_rest = all(w.lr == 0 for w in self.weights)
        if not opt._run.has_started(opt._current_tuner()):  # x_ref is taken where a run starts
            for w in self.weights:
                w.moved = w.x - array(w.p)

    @np.errstate(all="ignore")
    def check(self, recorded):
        """Compare with what is there after the step; return the number of elements compared.

        Args:
            recorded: (sums, the tuner's rows before they were tuned), or None if nothing was
                tuned: no gradient of the run has had an element other than 0, or there was none.
        """
        compared, sums = 0, {}
        for w in self.weights:
            after = self.opt.state.get(w.p, {})
            if recorded is None:
                agree("x", w, joined(w.p, after), w.x, np.zeros_like(w.x))
            if w.g is None or recorded is None:
                continue
            u, off, entries = w.update()
            for name, (expected, entry_off) in entries.items():
                found, rounded = numbers(after, name)
                agree(name, w, found, expected, entry_off + rounded)
            if "delta" in after:
                self.check_exact(w, after, u, off)
            else:
                self.check_running(w, after, recorded, u, off)
                self.add_sums(sums, w, u, off)
            compared += w.x.size
        for row, (values, allowed) in sums.items():
            for name, value in values.items():
                found = float(recorded[0][row, SUMS.index(name)])
                if np.isfinite([found, value, allowed[name]]).all():
                    off = abs(found - value)
                    assert off <= allowed[name], f"{name} of scale {row}: {found} for {value}"
        return compared

    def check_exact(self, w, after, u, off):
        """Compare Δ + u, and round(x_ref + S·Δ) with the S that was learned since."""
        size = np.abs(w.entry("delta")) + np.abs(u)
        delta, rounded = numbers(after, "delta")
        agree("Δ", w, delta, w.entry("delta") + u, off + 2 * EPS * size + rounded)
        scale = float(self.opt.scale[w.row])
        x_ref, move = array(after["x_ref"]), scale * delta
        size = np.abs(x_ref) + np.abs(move)
        last_place = torch.finfo(w.p.dtype).eps
        allowed = (2 * EPS + last_place) * size + torch.finfo(w.p.dtype).smallest_normal
        agree("x", w, w.p, x_ref + move, allowed)

    def check_running(self, w, after, recorded, u, off):
        """Compare x + S·u, with S as the tuner had it."""
        scale = float(recorded[1][w.row, LOG_TUNER.index("scale")])
        size = np.abs(w.x) + np.abs(scale * u)
        allowed = abs(scale) * off + 2 * EPS * size
        if w.p.dtype is torch.float16:  # 2⁻¹⁶ of the last place, of subnormal numbers too
            allowed = allowed + 2.0**-16 * np.maximum(2.0**-10 * size, 2.0**-24)
        if w.p.dtype is torch.bfloat16 and "x_low" not in after:  # rounded up or down
            allowed = allowed + BFLOAT16 * size
        if abs(scale) < 1e37:  # it enters as a float32 number
            agree("x", w, joined(w.p, after), w.x + scale * u, allowed)

    def add_sums(self, sums, w, u, off):
        """Add what a weight gives to the sums of its scale, and how far those may be off."""
        names = ("gd", "gg", "xx", "uu", "count")
        values, allowed = sums.setdefault(w.row, ({n: 0.0 for n in names}, {n: 0.0 for n in names}))
        if w.lr == 0 and not self.at_rest:  # S is for the others
            return
        to_peak = w.group["peak_lr"] / w.lr if w.lr else 0.0
        parts = {
            "gd": np.sum(w.g * w.moved) if w.is_whole else np.nan,
            "gg": np.sum(w.g * w.g),
            "xx": np.sum(w.x * w.x),
            "uu": np.sum(u * u) * to_peak**2,
            "count": w.x.size,
        }
        for name, part in parts.items():
            values[name] += part
            allowed[name] += SUM_RTOL * abs(part)
        # Cancelling terms; x − x_ref, a float32 number, is rounded once.
        allowed["gd"] += 2 * EPS * np.sum(np.abs(w.g * w.moved))
        allowed["uu"] += to_peak**2 * np.sum((2 * np.abs(u) + off) * off)


def agree(name, w, found, expected, allowed):
    """Compare elements, but for numbers that leave the range of the dtype."""
    found = array(found) if torch.is_tensor(found) else found
    largest = LARGEST.get(w.p.dtype, 1e37) if name == "x" else 1e37
    judged = np.isfinite(expected) & np.isfinite(allowed) & (np.abs(expected) < largest)
    bad = judged & ~(np.abs(found - expected) <= allowed + TINY)
    if bad.any():
        where = tuple(np.argwhere(bad)[0])
        raise AssertionError(
            f"{name} of a weight of shape {w.x.shape}, {w.p.dtype}, at {where}: {found[where]} "
            f"for {expected[where]} ± {allowed[where]}"
        )
