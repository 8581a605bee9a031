"""Stepping: one step and the parts that it is made of; no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import fallback
from .backends.layout import GG
from .distributed import Rows, step_together
from .gradient_release import GradientRelease, check_releasable
from .options import ZERO_WEIGHT, needs_start, start
from .plan import StepPlan
from .steering import Steering


class Stepping(Steering):
    """How :class:`Mechanized` takes a step.

    Its parts are public, so that containers can call those of several optimizers together:
    :func:`mechanic_fused.step_together` shows the order.
    """

    # What Mechanized has.
    max_grad_norm: float | None
    reduce_group: Any
    extra_groups: tuple[Any, ...]
    _class_options: dict[str, Any]
    _plan: StepPlan | None
    _release: GradientRelease | None
    _has_started: bool | None
    _lost_groups: bool
    _dry_run_done: bool
    _skips: bool
    _base_step: Any

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
        if not plan.collect_gradients() and not shared:
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
                self._dry_run(plan)
                return {}
            if self._dry_run_done:
                self.state.clear()
            plan.capture()
            self._has_started = True
        if self.max_grad_norm is not None and answers is not None:
            plan.clip(answers[1], self.max_grad_norm)
            self._squared_norm = answers[1]
        plan.reconcile()
        if plan.base is None:
            fallback.accumulate(self, plan.buckets, self._base_step())
        else:
            plan.accumulate()
        return plan.sums(shared)

    @torch.no_grad()
    def measure_start(self) -> Rows:
        """Return what s_init="auto" is taken from, after ``accumulate``: x·x, d·d and a count.

        Returns:
            {process groups: (3,) float64}, d being what the base adds to Δ at the peak lr; nothing
            where s_init is known.
        """
        if not needs_start(self.param_groups):
            return {}
        return self._prepared().start_norms(self.param_groups)

    def start(self, norms: Tensor) -> None:
        """Set s_init from the sums of ``measure_start`` over all parts; reads the device.

        Until a step has moved Δ (a warm-up may begin with lr = 0) there is nothing to go by.
        """
        if not needs_start(self.param_groups):
            return
        x_norm, d_norm = norms[:2].sqrt().tolist()
        if 0 < d_norm < math.inf and x_norm < math.inf:
            plan = self._prepared()
            # Weights that are all 0 tell no size.
            x_norm = x_norm or ZERO_WEIGHT * math.sqrt(norms[2].item())
            start(self.param_groups, x_norm, d_norm)
            plan.tuner.set_options(self.param_groups[0])
            plan.tuner.begin()

    @torch.no_grad()
    def apply(self, total: Tensor, pace: float | Tensor = 1.0) -> None:
        """Learn S and write the weights: the last part of a step.

        Args:
            total: what ``accumulate`` returned, summed over all parts.
            pace: the part of its move that s takes, which is that of the lr's schedule.
        """
        plan = self._prepared()
        if self.max_grad_norm is None:
            self._squared_norm = total[: len(plan.tuner.keys), GG]
        plan.tuner.set_options(self.param_groups[0])
        plan.tuner.set_pace(pace)
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
            self._release = GradientRelease(self, reduced)

    def _prepared(self) -> StepPlan:
        if self._plan is None:
            raise RuntimeError("prepare() must come first: see mechanic_fused.step_together")
        return self._plan

    def _dry_run(self, plan: StepPlan) -> None:
        """Let the base make its state in a dry step, as the fused road has done already.

        Checkpoint loaders look for the entries that they are to fill. What the base has put there
        is dropped at the first informative step, unless a checkpoint has taken its place.
        """
        if plan.base is None and not self.state:
            plan.load(self.param_groups, None, None)
            fallback.dry_run(self, plan.buckets, self._base_step())
            self._dry_run_done = True

    def _log(self) -> None:
        every = self._class_options["log_every"]
        if every <= 0:
            return
        steps = int(self._current_tuner().counters[0, 0])
        if steps % every == 0:
            self._class_options["log_func"]({"iter_count": steps, "s": float(self.scale.sum())})
