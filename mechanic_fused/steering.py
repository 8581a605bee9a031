"""Steering: what users read of a run and how they steer it; no arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, state
from .lr_schedule import PEAK, pace, track_peak_lr
from .options import STARTED
from .tuner import KEY


class Steering(Optimizer):
    """The methods of :class:`Mechanized` that are not needed to take a step."""

    # What Mechanized has.
    _base: type[Optimizer]
    _backend: str
    _squared_norm: Tensor | None
    _release: Any
    _tuner_options: dict[str, Any]
    _current_plan: Any
    _current_tuner: Any
    _forget: Any
    _fused_base: Any
    _refusal: Any
    _started: Any

    @property
    def scale(self) -> Tensor:
        """S = Σ s now: a new float64 tensor (scales,) on the weights' device."""
        return self._current_tuner().scale()

    def learned_lr(self) -> list[float]:
        """Return S·lr of each param group, as floats: what to log. Reads the device.

        With ``scale="parameter"`` it is the mean over the group's weights.
        """
        return [
            sum(scales) / len(scales) * float(group.get("lr", 1.0)) if scales else 0.0
            for group, scales in zip(self.param_groups, self.group_scales(), strict=True)
        ]

    def group_scales(self) -> list[list[float]]:
        """Return S of each param group, as floats: one, or one for each of its weights."""
        tuner = self._current_tuner()
        return [tuner.scale(group[KEY]).tolist() for group in self.param_groups]

    @property
    def road(self) -> str:
        """The road in use, and why: "fused: cpp", "general: RAdam has no fused update"."""
        refusal = self._refusal()
        if refusal:
            return f"general: {refusal}"
        devices = {p.device.type for group in self.param_groups for p in group["params"]}
        return f"fused: {', '.join(sorted(backends.resolve(self._backend, d) for d in devices))}"

    @property
    def grad_norm(self) -> Tensor:
        """The norm of all gradients in the last step, unscaled and before clipping, 0-dim float64.

        √(g·g) over all weights and ranks. With ``max_grad_norm`` elements that are not finite are
        left out; without, they make it NaN or infinite.
        """
        if self._squared_norm is None:
            return torch.zeros((), dtype=torch.float64, device=self._current_tuner().device)
        return self._squared_norm.sum().sqrt()

    @property
    def nonfinite_steps(self) -> int:
        """How many steps met a NaN or an infinity in their sums, and were survived."""
        return int(self._current_tuner().counters[:1, 1].sum())

    @torch.no_grad()
    def shift_reference(self) -> None:
        """Accept the weights as they stand: x_ref moves by what was written since the last step.

        Needed only after writes that torch cannot see (through ``.data`` or numpy); all others
        are noticed by themselves.
        """
        if self._started:
            plan = self._current_plan()
            if self._release is not None and self._release.taken:
                raise RuntimeError(
                    "shift_reference() must come before backward() or after step() where gradients "
                    "are released"
                )
            plan.load(self.param_groups, None, None)
            plan.reconcile(everything=True)

    def freeze_scale(self, frozen: bool = True) -> None:
        """Stop learning S (or, with False, learn on): the weights go on moving by S·u."""
        for group in self.param_groups:
            group["learning"] = not frozen

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Start anew from the current weights: S as at the start, Δ = 0, x_ref = x.

        The base's own state (momentum) is kept; the count of non-finite steps starts at 0.
        """
        for bucket in self._current_plan().buckets:
            for delta in bucket.delta:
                delta.zero_()
        for entries in self.state.values():
            # Also of weights that are frozen now.
            if isinstance(entries, dict) and "delta" in entries:
                entries["delta"].zero_()
        for group in self.param_groups:
            group.update({name: self._tuner_options[name] for name in STARTED})
            group.pop(PEAK, None)
        self._current_tuner().reset()
        self._forget()

    def to_base(self) -> Optimizer:
        """Return a plain base optimizer over the same weights, at the learned lr, with its state.

        A scale for each weight makes a param group for each weight. The state is a copy; torch
        keeps it in the weight's dtype.
        """
        base = self._fused_base()
        return state.to_base(self, self._base, base.keeps if base else None)

    def refresh_hyperparameters(self) -> None:
        """Send changed hyperparameters to the device, before replaying a captured step.

        A replay runs no Python, so a float lr that a scheduler has changed must be sent so; an lr
        that is a tensor on the device is live by itself.
        """
        if self._started:
            track_peak_lr(self.param_groups, started=True)
            plan = self._current_plan()
            plan.load(self.param_groups, None, None)
            plan.tuner.set_pace(pace(self.param_groups))
