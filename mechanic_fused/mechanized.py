"""Mechanized: what mechanize(Base) puts in front of Base. It keeps the books, no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, bases, general, state
from .bucket import GG
from .distributed import Rows, step_together
from .plan import StepPlan
from .release import GradientRelease, check_releasable
from .steering import Steering
from .tuner import OPTIONS, Tuner, check_saved, check_scale, checked_options, scale_keys


class Mechanized(Steering):
    """What mechanize(Base) puts in front of Base: x = x_ref + S·Δ with a learned scale S.

    Not made by itself: see :func:`mechanize`.
    """

    _base: type[Optimizer]
    _class_options: dict[str, Any]
    _reads_scaler = False

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
        max_grad_norm: float | None = None,
        reduce_group: Any = None,
        extra_groups: Sequence[Any] = (),
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
        self._rehearsed = self._skips = False
        self._squared_norm: Tensor | None = None

    # The step

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: g → Δ, then the scale, then x = x_ref + S·Δ.

        Until the first step with a gradient element that is not 0, only state is made. Where
        weights are sharded, every rank must call it.

        Args:
            closure: evaluates the model again and returns the loss, which ``step`` returns.

        Raises:
            ValueError: for gradients or weights that cannot be used; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step_together([self])
        return loss

    @torch.no_grad()
    def prepare(self) -> bool:
        """Look at the weights: the first part of a step, which containers take apart.

        :func:`mechanic_fused.step_together` shows how the parts are called.

        Returns:
            Whether sums have to be added to those of other ranks.

        Raises:
            ValueError: for weights that cannot be trained.
            RuntimeError: for a copy that has lost the process groups of its original.
        """
        if self._lost_groups and self.reduce_group is None and not self.extra_groups:
            raise RuntimeError(
                "process groups cannot be copied or pickled: set reduce_group or extra_groups of "
                "the copy to what the original had"
            )
        return not self._current_plan().alone or bool(self.extra_groups)

    @torch.no_grad()
    def inspect(self, shared: bool = False) -> Rows:
        """Look at the gradients before anything changes: the second part of a step.

        Args:
            shared: whether this is a part of a model, by ranks or by optimizers.

        Returns:
            {process groups: (2,) float64}: whether gradients are not all 0, and Σ g·g; nothing
            where no question is open.

        Raises:
            ValueError: for gradients or weights that cannot be used.
        """
        plan = self._prepared()
        found_inf = getattr(self, "found_inf", None)
        if self._release is not None:
            self._release.check(plan, scaled=found_inf is not None)
            plan.release = self._release
        if not plan.gather() and not shared:
            return {}
        if shared and found_inf is not None:
            found_inf = plan.agree(found_inf, self.extra_groups)
        self._skips = not plan.on_device and bool(found_inf)
        if self._skips:
            return {}
        plan.load(self.param_groups, getattr(self, "grad_scale", None), found_inf)
        if self._started and self.max_grad_norm is None:
            return {}
        return plan.inspect(self._started, self.max_grad_norm is not None)

    @torch.no_grad()
    def accumulate(self, answers: Tensor | None = None, shared: bool = False) -> Rows:
        """Take the sums and move the base's state and Δ on: the third part of a step.

        Args:
            answers: what ``inspect`` returned, summed over all parts; None if that was nothing.
            shared: as for ``inspect``.

        Returns:
            {process groups: (scales, 4) float64}: this rank's g·Δ, x·Δ, g·g, x·x, with a further
            row if shared; nothing if the step is skipped, and then ``apply`` is not to be called.
        """
        plan = self._prepared()
        if self._skips or not (plan.present or shared):
            return {}
        if not self._started:
            if answers is None or not answers[0]:
                self._rehearse(plan)
                return {}
            if self._rehearsed:
                self.state.clear()
            plan.capture()
            self._has_started = True
        if self.max_grad_norm is not None and answers is not None:
            plan.clip(answers[1], self.max_grad_norm)
            self._squared_norm = answers[1]
        plan.reconcile()
        if plan.base is None:
            general.accumulate(self, plan.buckets, self._base_step())
        else:
            plan.accumulate()
        return plan.sums(shared)

    @torch.no_grad()
    def apply(self, total: Tensor) -> None:
        """Learn S and write the weights: the last part of a step.

        Args:
            total: what ``accumulate`` returned, summed over all parts.
        """
        plan = self._prepared()
        if self.max_grad_norm is None:
            self._squared_norm = total[: len(plan.tuner.keys), GG]
        plan.tune(total)
        plan.apply()
        self._log()

    def finish(self) -> None:
        """Let go of the gradients, or they would outlive the next zero_grad."""
        if self._plan is not None:
            self._plan.finish()

    def release_gradients(self, reduced: bool = False) -> None:
        """Take each weight's part of a step in the backward pass, and drop its gradient there.

        Only one gradient or a few are then in memory at a time; ``step()`` learns S and writes the
        weights. The numbers are those of the ordinary step, but for the order of the sums. From
        the second informative step on; calling it again changes nothing.

        Args:
            reduced: that gradients of plain weights need no reduction over ranks after the
                backward pass (DistributedDataParallel does one, ``fully_shard`` does not).

        Raises:
            ValueError: on the general road, with ``max_grad_norm``, or for plain weights in a world
                of several ranks. What cannot be seen here: clipping by torch finds no gradients, a
                second backward pass before ``step()`` and GradScaler raise RuntimeError.
        """
        check_releasable(self, reduced)
        if self._release is None:
            self._release = GradientRelease(self)

    def _prepared(self) -> StepPlan:
        if self._plan is None:
            raise RuntimeError("prepare() must come first: see mechanic_fused.step_together")
        return self._plan

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
        if self._release is not None:
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
        kept = "_tuner_options _scale_kind _backend _narrow_state max_grad_norm _rehearsed".split()
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
        rehearsed = state.get("_rehearsed", False)
        if "reduce_group" not in vars(self):
            self.reduce_group, self.extra_groups = None, ()
            self._release = None
        self._forget()
        self._rehearsed = rehearsed


def check_norm(max_grad_norm: float | None) -> float | None:
    """Return the bound on the gradients' norm, or raise ValueError."""
    if max_grad_norm is not None and not (
        isinstance(max_grad_norm, int | float) and 0 < max_grad_norm < math.inf
    ):
        raise ValueError(
            f"max_grad_norm must be None or a finite number above 0, got {max_grad_norm!r}"
        )
    return max_grad_norm
