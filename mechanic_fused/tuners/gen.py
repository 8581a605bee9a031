"""GeN: move the lr towards the minimizer of a parabola along the optimizer's own step."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..options import number
from .probe import Parabola, parabola
from .probe_scheduler import ProbeScheduler
from .trial import Closure

MULTIPLES = {3: (-1.0, 0.0, 1.0), 5: (-2.0, -1.0, 0.0, 1.0, 2.0)}


class GeN(ProbeScheduler):
    """Move the lr towards the minimizer of the loss along the step (generalized Newton).

    Every ``every`` steps a parabola is fitted through L(−1), L(0) and L(1), or five losses, where
    L(r) is the loss at x − r·d and d the step that the optimizer would take at its lr η:

    η* = (η/2)·(L₋ − L₊)/(L₋ − 2L₀ + L₊),   η ← smoothing·η + (1 − smoothing)·clip(η*, η/2, 2η).

    η* is accepted if curvature and slope are positive and, with five points, R² > ``r_squared``.

    Args:
        optimizer: any torch optimizer; its lr is the initial η. The lrs of all groups are
            multiplied by the same factor.
        model: the model whose buffers are restored after a probe, if it has any.
        every: steps from one probe to the next, Φ in the paper.
        points: 3 or 5 losses per probe, each one forward pass.
        smoothing: the coefficient of the moving average, in [0, 1).
        bound: η* is clipped to [η/bound, bound·η].
        r_squared: the least R² with five points.
        min_lr, max_lr: the range of each group's lr.
        probe_options: ``backend``, ``reduce_group`` and ``process_group`` of :class:`LineProbe`.

    Raises:
        ValueError: for options out of range.

    Source: arXiv 2407.02772 and its authors' code. Ours: a probe takes one step of the base
    optimizer, not two, and restores batch norm's statistics and the random generators. Pass a
    closure with a fresh batch if there is one. Start near a good lr: with the defaults one probe
    raises it by a factor of 1.1 at most.

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
        if points not in MULTIPLES:
            raise ValueError(f"points must be 3 or 5, got {points!r}")
        number("smoothing", smoothing, 0, 1, below=True)
        if not bound >= 1:
            raise ValueError(f"bound must be 1 or more, got {bound}")
        super().__init__(optimizer, model, every, min_lr, max_lr, **probe_options)
        self.multiples = MULTIPLES[points]
        self.smoothing, self.bound, self.r_squared = smoothing, bound, r_squared
        self.fit: Parabola | None = None
        """The parabola of the last probe, accepted or not; None if a loss was not finite."""

    def _lr_factor(self, closure: Closure) -> float | None:
        self.losses = self.probe(closure, self.multiples)
        self.fit = fit = parabola(self.multiples, self.losses)
        if fit is None or not fit.convex:
            return None
        if len(self.multiples) > 3 and not fit.r_squared > self.r_squared:
            return None
        target = min(self.bound, max(1 / self.bound, fit.minimizer))
        return self.smoothing + (1 - self.smoothing) * target
