"""Mechanized: what mechanize(Base) puts in front of Base. It keeps the books, no arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, bases, general, state
from .plan import StepPlan
from .tuner import KEY, OPTIONS, Tuner, check_saved, check_scale, checked_options, scale_keys


class Mechanized(Optimizer):
    """What mechanize(Base) puts in front of Base: x = x_ref + S·Δ with a learned scale S.

    Not made by itself: see :func:`mechanize`.
    """

    _base: type[Optimizer]
    _class_options: dict[str, Any]

    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        s_decay: float | None = None,
        tuner_betas: Sequence[float] | None = None,
        s_init: float | None = None,
        tuner_eps: float | None = None,
        variant: str | None = None,
        scale: str | None = None,
        backend: str | None = None,
        narrow_state: bool = False,
        **base_options: Any,
    ) -> None:
        if not hasattr(self, "_base"):
            raise TypeError("Mechanized has no base of its own: use mechanize(Base)")
        if not isinstance(narrow_state, bool):
            raise ValueError(f"narrow_state must be True or False, got {narrow_state!r}")
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
        self._tuner_options = checked_options(**{k: chosen[k] for k in OPTIONS if k != "learning"})
        self._scale_kind = chosen["scale"]
        self._backend = chosen["backend"]
        check_scale(self._scale_kind)
        backends.check(self._backend)
        self._narrow_state = narrow_state
        self._forget()
        super().__init__(params, *args, **base_options)
        # The tuner's state is in param_groups from the start: loaders look for it there.
        self._current_tuner()

    def _forget(self) -> None:
        """Drop all that can be derived from param_groups and state."""
        self._plan: StepPlan | None = None
        self._tuner: Tuner | None = None
        self._has_started: bool | None = None
        self._rehearsed = False

    # The step

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: g → Δ, then the scale, then x = x_ref + S·Δ.

        Until the first step with a gradient element that is not 0, only state is made.

        Args:
            closure: evaluates the model again and returns the loss, which ``step`` returns.

        Raises:
            ValueError: for gradients or weights that cannot be used; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            plan = self._current_plan()
            try:
                self._advance(plan)
            finally:
                plan.release()
        return loss

    def _advance(self, plan: StepPlan) -> None:
        if not plan.gather():
            return
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if not plan.on_device and bool(found_inf):
            return
        if not self._started:
            if not plan.informative():
                self._rehearse(plan)
                return
            if self._rehearsed:
                self.state.clear()
            plan.capture()
            self._has_started = True
        plan.load(self.param_groups, grad_scale, found_inf)
        plan.reconcile()
        if plan.base is None:
            general.accumulate(self, plan.buckets, self._base_step())
        else:
            plan.accumulate()
        plan.tune()
        plan.apply()
        self._log()

    def _rehearse(self, plan: StepPlan) -> None:
        """Let the base make its state in a dry step, as the fused road has done already.

        Checkpoint loaders look for the entries that they are to fill. What the base has put there
        is dropped at the first informative step, unless a checkpoint has taken its place.
        """
        if plan.base is None and not self.state:
            plan.load(self.param_groups, None, None)
            general.rehearse(self, plan.buckets, self._base_step())
            self._rehearsed = True

    def _current_plan(self) -> StepPlan:
        base = self._fused_base()
        tuner = self._current_tuner()
        if self._plan is None or not self._plan.fits(self.param_groups, base):
            self._plan = StepPlan(
                self.param_groups,
                self.state,
                base,
                self._backend,
                self._scale_kind,
                self._narrow_state,
                tuner,
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

    def _fused_base(self) -> bases.Base | None:
        return None if self._refusal() else bases.TABLE[self._base]

    def _refusal(self) -> str | None:
        """Return why the general road is in use, or None."""
        base = bases.TABLE.get(self._base)
        if base is None:
            return f"{self._base.__name__} has no fused update"
        return next(filter(None, (base.refusal(group) for group in self.param_groups)), None)

    def _base_step(self) -> Callable[[Optimizer], Any]:
        """Return the base's own step without the wrapper by which torch runs the hooks: ours has
        run them already."""
        step: Any = self._base.step
        return step.__wrapped__ if hasattr(step, "hooked") else step

    def _log(self) -> None:
        every = self._class_options["log_every"]
        if every <= 0:
            return
        steps = int(self._current_tuner().counters[0, 0])
        if steps % every == 0:
            self._class_options["log_func"]({"iter_count": steps, "s": float(self.scale.sum())})

    def refresh_hyperparameters(self) -> None:
        """Send changed hyperparameters to the device, before replaying a captured step.

        A replay runs no Python, so a float lr that a scheduler has changed must be sent so; an lr
        that is a tensor on the device is live by itself.
        """
        if self._started:
            plan = self._current_plan()
            plan.load(self.param_groups, None, None)

    # What users read and steer

    @property
    def scale(self) -> Tensor:
        """S = Σ s now: a new float64 tensor (scales,) on the weights' device."""
        return self._current_tuner().scale()

    def learned_lr(self) -> list[float]:
        """Return S·lr of each param group, as floats: what to log. Reads the device.

        With ``scale="parameter"`` it is the mean over the group's weights.
        """
        return [
            sum(scales) / len(scales) * float(group["lr"]) if scales else 0.0
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
        self._current_tuner().reset()
        self._forget()

    def to_base(self) -> Optimizer:
        """Return a plain base optimizer over the same weights, at the learned lr, with its state.

        A scale for each weight makes a param group for each weight. The state is a copy; torch
        keeps it in the weight's dtype.
        """
        base = self._fused_base()
        return state.to_base(self, self._base, base.keeps if base else None)

    # Being a torch optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its weights join the run where they stand.

        Raises:
            ValueError: for tuner options that differ from the other groups', or differentiable.
        """
        if param_group.get("differentiable", self.defaults.get("differentiable")):
            raise ValueError("differentiable must be False: a step of Mechanic has no derivative")
        for name, value in self._tuner_options.items():
            if param_group.setdefault(name, value) != value:
                raise ValueError(
                    f"{name} must be the same in all groups: expected {value}, "
                    f"got {param_group[name]}"
                )
        super().add_param_group(param_group)

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
        kept = ("_tuner_options", "_scale_kind", "_backend", "_narrow_state", "_rehearsed")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._tuner_options.items():
                group.setdefault(name, value)
        if self.defaults.get("fused"):
            # Torch sets it in the constructor of its fused optimizers, and forgets it in copies.
            self._step_supports_amp_scaling = True
        rehearsed = state.get("_rehearsed", False)
        self._forget()
        self._rehearsed = rehearsed
