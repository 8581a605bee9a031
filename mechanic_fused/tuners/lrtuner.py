"""LRTuner: first the largest lr that does not raise the loss, later the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..options import integer, number
from .probe import Parabola, parabola
from .probe_scheduler import ProbeScheduler
from .trial import Closure


class LRTuner(ProbeScheduler):
    """Set the lr by a parabola along the step: first to its far edge, later to its minimum.

    With d the step at the present lr η, L(r) ≈ L₀ − s·r + ½κ·r² is fitted to losses at x − r·d:

    explore (first part of the run):  r = (s + √(s² + 2κ·tolerance·|L₀|))/κ, the largest r with
    L(r) ≤ L₀ + tolerance·|L₀|;   exploit (the rest):  r = s/κ;

    then η ← η·clip(r, 1/bound, bound).

    If κ ≤ 0 there is no minimum: the lr is multiplied by ``bound`` while exploring if s > 0, and
    kept while exploiting. If s ≤ 0 (except while exploiting with κ ≤ 0), or if a loss is not
    finite, the lr is divided by ``bound``.

    Args:
        optimizer: any torch optimizer; its lr is the initial η.
        model: the model whose buffers are restored after a probe, if it has any.
        steps: steps of the whole run.
        explore: the fraction of the steps that explores, in [0, 1].
        every: steps from one probe to the next.
        multiples: the values of r at which the loss is evaluated; three or more.
        tolerance: by how much a step may raise the loss while exploring, as a fraction of the loss.
        bound: the largest factor by which one probe changes the lr. Larger bounds raise the lr
            before the loss shows that it is too large; Adam diverged with 2.
        min_lr, max_lr: the range of each group's lr.
        probe_options: ``backend``, ``reduce_group`` and ``process_group`` of :class:`LineProbe`.

    Raises:
        ValueError: for options out of range.

    Source: arXiv 2105.14526, of which only the abstract was available: the lr is tuned during
    training, for any optimizer. The parabola through a few losses on a larger batch and the two
    phases are recalled and unverified; half of the run at a high lr is the shape of the same
    authors' Knee schedule (JMLR 24:65). Intervals, thresholds, bounds and multiples are ours. Pass
    a closure with a larger or another batch: on the batch of the gradient the loss falls too far.

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
        integer("steps", steps, 1)
        number("explore", explore, 0, 1)
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

    def _lr_factor(self, closure: Closure) -> float | None:
        self.losses = self.probe(closure, self.multiples)
        fit = parabola(self.multiples, self.losses)
        if fit is None:
            return 1 / self.bound
        target = self._edge(fit) if self.exploring else self._minimum(fit)
        return None if target is None else min(self.bound, max(1 / self.bound, target))

    def _edge(self, fit: Parabola) -> float:
        """Return the largest r at which the loss is within the tolerance."""
        slack = self.tolerance * abs(fit.level)
        if fit.slope <= 0:
            return 1 / self.bound
        if fit.curvature <= 0:
            return self.bound
        discriminant = fit.slope**2 + 2 * fit.curvature * slack
        return (fit.slope + math.sqrt(discriminant)) / fit.curvature

    def _minimum(self, fit: Parabola) -> float | None:
        """Return the r of the minimum, or None if there is none."""
        if fit.curvature <= 0:
            return None
        return fit.minimizer
