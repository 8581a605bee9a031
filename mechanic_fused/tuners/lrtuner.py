"""LRTuner: explore with the largest lr that does no harm, then exploit with the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .probe import Closure, Parabola, parabola
from .probe_scheduler import ProbeScheduler


class LRTuner(ProbeScheduler):
    """Tune the lr on a parabola along the step: its far edge first, its minimum later.

    With d the step at the present lr η and L(r) ≈ L₀ − s·r + ½κ·r² fitted to losses at x − r·d,

    explore (the first part of the steps):  r = (s + √(s² + 2κ·tolerance·|L₀|))/κ, the largest r
    with L(r) ≤ L₀ + tolerance·|L₀|;   exploit (the rest):  r* = s/κ;

    then η ← η·clip(r, 1/bound, bound). Where κ ≤ 0 the parabola has no minimum: the lr grows by
    ``bound`` if the loss falls along it (s > 0) while exploring, and stays when exploiting. Where
    s ≤ 0 even a small step does harm, and where a loss is not finite a step did: the lr shrinks by
    ``bound`` (while exploiting with κ ≤ 0 it stays).

    Args:
        optimizer: any torch optimizer; its lr is where the search starts.
        model: its buffers are kept by the probe.
        steps: of the whole run.
        explore: the part of them that explores, in [0, 1].
        every: steps from one look to the next.
        multiples: of the step, where losses are taken: three or more.
        tolerance: how much the loss may rise in a step while exploring, as a part of itself.
        bound: the largest factor by which a look changes the lr; with larger ones it runs ahead of
            what the loss has had time to show, and past what Adam survives.
        min_lr, max_lr: the range of each group's lr.
        probe_options: ``backend``, ``reduce_group``, ``process_group`` of :class:`LineProbe`.

    Raises:
        ValueError: for options out of range.

    Source: arXiv 2105.14526, of which only the abstract could be had: that the lr is tuned as
    training goes, for any optimizer. That it fits a parabola to a few losses on a larger batch,
    that a first phase takes large lrs and a second the minimum, is recalled and unverified; the
    shape with half of the run at high lr is that of the same authors' Knee schedule (JMLR 24:65).
    Intervals, thresholds, bounds and multiples are ours. Give the closure a larger batch than a
    training step's, or another one: on the batch of the gradient itself the loss falls too well.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import LRTuner
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = torch.optim.SGD(model.parameters(), lr=1e-3)
        >>> tuner = LRTuner(opt, model, steps=100)
        >>> z = torch.ones(4, 3)
        >>> (model(z) - 1).square().mean().backward()
        >>> tuner.step(lambda: (model(z) - 1).square().mean())
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        *,
        steps: int,
        explore: float = 0.5,
        every: int = 10,
        multiples: Sequence[float] = (0.0, 0.5, 1.0, 2.0),
        tolerance: float = 0.0,
        bound: float = 1.1,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
        **probe_options: Any,
    ) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an integer of 1 or more, got {steps!r}")
        if not 0 <= explore <= 1:
            raise ValueError(f"explore must lie in [0, 1], got {explore}")
        if len(set(multiples)) < 3:
            raise ValueError(f"multiples must be three different numbers or more, got {multiples}")
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be 0 or more, got {tolerance}")
        if not bound >= 1:
            raise ValueError(f"bound must be 1 or more, got {bound}")
        super().__init__(optimizer, model, every, min_lr, max_lr, **probe_options)
        self.steps, self.explore = steps, explore
        self.multiples = tuple(map(float, multiples))
        self.tolerance, self.bound = tolerance, bound

    @property
    def exploring(self) -> bool:
        """Whether the next step is in the first phase."""
        return self.count < self.explore * self.steps

    def _factor(self, closure: Closure) -> float | None:
        self.losses = self.probe(closure, self.multiples)
        fit = parabola(self.multiples, self.losses)
        if fit is None:
            return 1 / self.bound
        wanted = self._edge(fit) if self.exploring else self._minimum(fit)
        return None if wanted is None else min(self.bound, max(1 / self.bound, wanted))

    def _edge(self, fit: Parabola) -> float:
        slack = self.tolerance * abs(fit.level)
        if fit.slope <= 0:
            return 1 / self.bound
        if fit.curvature <= 0:
            return self.bound
        inside = fit.slope**2 + 2 * fit.curvature * slack
        return (fit.slope + math.sqrt(inside)) / fit.curvature

    def _minimum(self, fit: Parabola) -> float | None:
        if fit.curvature <= 0:
            return None
        return fit.minimizer
