"""GeN: the lr follows the minimizer of a parabola along the optimizer's own step."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from .probe import Closure, Parabola, parabola
from .probe_scheduler import ProbeScheduler

POINTS = {3: (-1.0, 0.0, 1.0), 5: (-2.0, -1.0, 0.0, 1.0, 2.0)}


class GeN(ProbeScheduler):
    """Move the lr towards the minimizer of the loss along the step (generalized Newton).

    Every ``every`` steps, with d the step that the optimizer would make at its lr η and
    L(r) = loss at x − r·d, a parabola through L(−1), L(0), L(1) (or five points) gives

    η* = (η/2)·(L₋ − L₊)/(L₋ − 2L₀ + L₊),   η ← smoothing·η + (1 − smoothing)·clip(η*, η/2, 2η),

    accepted if the curvature and the slope are above 0 and, with five points, R² > 0.99.

    Args:
        optimizer: any torch optimizer; its lr is where the search starts, and all groups' lrs
            move by one factor.
        model: its buffers are kept by the probe.
        every: the paper's lazy frequency Φ, in steps.
        points: 3 or 5 losses a look: that many forward passes.
        smoothing: of the moving average, in [0, 1).
        bound: the largest factor between η* as it is used and η.
        r_squared: the least R² with five points.
        min_lr, max_lr: the range of each group's lr.
        probe_options: ``backend``, ``reduce_group``, ``process_group`` of :class:`LineProbe`.

    Raises:
        ValueError: for options out of range.

    Source: arXiv 2407.02772 and its authors' code, with a fresh batch where the closure has one.
    Unlike that code the base takes one step, not two, where it looks, and batch norm's statistics
    and the random generators do not move. The lr starts where you set it: the method follows a
    good lr more readily than it finds one from far away.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import GeN
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = torch.optim.SGD(model.parameters(), lr=1e-3)
        >>> tuner = GeN(opt, model, every=4)
        >>> z = torch.ones(4, 3)
        >>> for _ in range(8):
        ...     opt.zero_grad()
        ...     (model(z) - 1).square().mean().backward()
        ...     _ = tuner.step(lambda: (model(z) - 1).square().mean())
        ...     opt.step()
        >>> tuner.get_last_lr()[0] > 1e-3
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        every: int = 8,
        points: int = 3,
        smoothing: float = 0.9,
        bound: float = 2.0,
        r_squared: float = 0.99,
        min_lr: float = 0.0,
        max_lr: float = float("inf"),
        **probe_options: Any,
    ) -> None:
        if points not in POINTS:
            raise ValueError(f"points must be 3 or 5, got {points!r}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
        if not bound >= 1:
            raise ValueError(f"bound must be 1 or more, got {bound}")
        super().__init__(optimizer, model, every, min_lr, max_lr, **probe_options)
        self.multiples = POINTS[points]
        self.smoothing, self.bound, self.r_squared = smoothing, bound, r_squared
        self.fit: Parabola | None = None
        """The last look's parabola, accepted or not; None if a loss was not finite."""

    def _factor(self, closure: Closure) -> float | None:
        self.losses = self.probe(closure, self.multiples)
        self.fit = fit = parabola(self.multiples, self.losses)
        if fit is None or not fit.convex:
            return None
        if len(self.multiples) > 3 and not fit.r_squared > self.r_squared:
            return None
        wanted = min(self.bound, max(1 / self.bound, fit.minimizer))
        return self.smoothing + (1 - self.smoothing) * wanted
