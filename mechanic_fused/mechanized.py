"""Mechanized: what mechanize(Base) puts in front of Base. It keeps the books, no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, fused_bases, state
from .gradient_release import GradientRelease, check_releasable
from .lr_schedule import PEAK
from .options import CHECKED, STARTED, checked_options
from .plan import StepPlan
from .stepping import Stepping
from .tuner import Tuner, check_saved, check_scale, scale_keys


class Mechanized(Stepping):
    """What mechanize(Base) puts in front of Base: x = x_ref + S·Δ with a learned scale S.

    Not made by itself: see :func:`mechanize`.
    """

    _base: type[Optimizer]
    _class_options: dict[str, Any]
    _reads_scaler = False
    # Pickles of an older version lack it.
    _narrow_delta = False

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        s_decay: float | None = None,
        tuner_betas: Sequence[float] | None = None,
        s_init: float | str | None = None,
        tuner_eps: float | None = None,
        variant: str | None = None,
        scale: str | None = None,
        backend: str | None = None,
        narrow_state: bool = False,
        narrow_delta: bool = False,
        max_grad_norm: float | None = None,
        reduce_group: Any = None,
        extra_groups: Sequence[Any] = (),
        **base_options: Any,
    ) -> None:
        if not hasattr(self, "_base"):
            raise TypeError("Mechanized has no base of its own: use mechanize(Base)")
        for name, value in (("narrow_state", narrow_state), ("narrow_delta", narrow_delta)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        given = {
            "s_decay": s_decay,
            "tuner_betas": tuner_betas,
            "s_init": s_init,
            "tuner_eps": tuner_eps,
            "variant": variant,
            "scale": scale,
            "backend": backend,
        }
        chosen = {**self._class_options, **{k: v for k, v in given.items() if v is not None}}
        self._tuner_options = checked_options(**{k: chosen[k] for k in CHECKED})
        self._scale_kind = chosen["scale"]
        self._backend = chosen["backend"]
        check_scale(self._scale_kind)
        backends.check(self._backend)
        self._narrow_state, self._narrow_delta = narrow_state, narrow_delta
        self.max_grad_norm = check_norm(max_grad_norm)
        self.reduce_group = reduce_group
        self.extra_groups = tuple(extra_groups)
        self._lost_groups = False
        self._release: GradientRelease | None = None
        self._forget()
        super().__init__(params, *args, **base_options)
        # The tuner's state is in param_groups from the start: loaders look for it there.
        self._current_tuner()

    def _forget(self) -> None:
        """Drop all that can be derived from param_groups and state."""
        self._plan: StepPlan | None = None
        self._tuner: Tuner | None = None
        self._has_started: bool | None = None
        self._dry_run_done = self._skips = False
        self._squared_norm: Tensor | None = None

    def _current_plan(self) -> StepPlan:
        base = self._fused_base()
        tuner = self._current_tuner()
        if self._plan is None or not self._plan.fits(self.param_groups, base, self.reduce_group):
            self._plan = StepPlan(
                self.param_groups,
                self.state,
                base,
                self._backend,
                self._scale_kind,
                self._narrow_state,
                self._narrow_delta,
                tuner,
                self.reduce_group,
            )
        return self._plan

    def _current_tuner(self) -> Tuner:
        groups = self.param_groups
        device = next((p.device for g in groups for p in g["params"]), torch.device("cpu"))
        # Weights made on the meta device get their storage, and their device, later.
        device = torch.device("cpu") if device.type == "meta" else device
        if self._tuner is None or self._tuner.device != device:
            self._tuner = Tuner(scale_keys(groups, self._scale_kind), groups[0], device)
        self._tuner.follow(groups, self._scale_kind)
        self._tuner.set_options(groups[0])
        return self._tuner

    @property
    def _started(self) -> bool:
        """Whether an informative step has been taken; asks the device once."""
        if self._has_started is None:
            self._has_started = bool(self._current_tuner().counters[:, 0].any())
        return self._has_started

    def _fused_base(self) -> fused_bases.Base | None:
        return None if self._refusal() else fused_bases.TABLE[self._base]

    def _refusal(self) -> str | None:
        """Return why the general road is in use, or None."""
        base = fused_bases.TABLE.get(self._base)
        if base is None:
            return f"{self._base.__name__} has no fused update"
        return next(filter(None, (base.refusal(group) for group in self.param_groups)), None)

    def _base_step(self) -> Callable[[Optimizer], Any]:
        """Return the base's own step without the wrapper by which torch runs the hooks: ours has
        run them already."""
        step: Any = self._base.step
        return step.__wrapped__ if hasattr(step, "hooked") else step

    # Being a torch optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its weights join the run where they stand.

        Raises:
            ValueError: for tuner options that differ from the other groups', or differentiable.
        """
        if param_group.get("differentiable", self.defaults.get("differentiable")):
            raise ValueError("differentiable must be False: a step of Mechanic has no derivative")
        now = self.param_groups[0] if self.param_groups else {}
        for name, value in self._tuner_options.items():
            if name in STARTED:
                value = now.get(name, value)
            if name == "rate":
                # Found at each step; what is there is of another optimizer.
                param_group[name] = value
            if param_group.setdefault(name, value) != value:
                raise ValueError(
                    f"{name} must be the same in all groups: expected {value}, "
                    f"got {param_group[name]}"
                )
        super().add_param_group(param_group)
        lr = float(param_group.get("lr", 1.0))
        # One that joins a run late in its schedule is not at its peak.
        param_group[PEAK] = max(lr, param_group["rate"]) if self.state else lr
        if self._release is not None:
            try:
                check_releasable(self, self._release.reduced)
            except ValueError:
                self.param_groups.pop()
                raise
            self._release.watch(self.param_groups[-1]["params"])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler may leave its numbers to us. Not where plain weights are sharded:
        torch then takes found_inf from this rank alone."""
        return self._reads_scaler and self.reduce_group is None

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, supports: bool) -> None:
        self._reads_scaler = supports

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours, or one of the plain base; dtypes stay as they were saved.

        As with every torch optimizer the saved hyperparameters come along: after loading a plain
        base's checkpoint set ``lr`` (and a scheduler's ``initial_lr``) of each group back to 1.

        Raises:
            ValueError: for a checkpoint with another kind of scale, or other groups.
        """
        check_saved(state_dict["param_groups"], self.param_groups, self._scale_kind)
        state.load_keeping_dtypes(self, super().load_state_dict, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        kept = "_tuner_options _scale_kind _backend max_grad_norm _dry_run_done".split()
        kept += ["_narrow_state", "_narrow_delta"]
        lost = self._lost_groups or self.reduce_group is not None or bool(self.extra_groups)
        ours = {name: getattr(self, name) for name in kept}
        return {**super().__getstate__(), **ours, "_lost_groups": lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._tuner_options.items():
                group.setdefault(name, value)
        if self.defaults.get("fused"):
            # Torch sets it in the constructor of its fused optimizers, and forgets it in copies.
            self._step_supports_amp_scaling = True
        # Another of the constructor's marks: without it a base of the general road asks each group
        # whether it is capturable, and not every base knows that option.
        self._warned_capturable_if_run_uncaptured = True
        rehearsed = state.get("_dry_run_done", False)
        if "reduce_group" not in vars(self):
            self.reduce_group, self.extra_groups = None, ()
            self._release = None
        self._forget()
        self._dry_run_done = rehearsed


def check_norm(max_grad_norm: float | None) -> float | None:
    """Return the bound on the gradients' norm, or raise ValueError."""
    if max_grad_norm is not None and not (
        isinstance(max_grad_norm, int | float) and 0 < max_grad_norm < math.inf
    ):
        raise ValueError(
            f"max_grad_norm must be None or a finite number above 0, got {max_grad_norm!r}"
        )
    return max_grad_norm
