"""LQA: at every step the lr that minimizes a parabola along the gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .probe import Closure, parabola
from .probe_scheduler import ProbeScheduler, finite


class LQA(ProbeScheduler):
    """Set plain SGD's lr to the minimizer of a local quadratic approximation.

    At every step, along e = g/max|g| and with a distance δ,

    lr = (δ/2)·(L₋ − L₊)/(L₋ − 2L₀ + L₊)/max|g|,   L± = loss at x ∓ δ·e,

    if curvature and slope are above 0; else the lr stays. δ is the last step's own length
    lr·max|g|, so that the parabola is fitted where it is used.

    Args:
        optimizer: torch.optim.SGD without momentum and weight decay; its lr is only the first
            distance.
        model: its buffers are kept by the probe.
        every: steps from one look to the next.
        bound: the largest factor by which a look changes the lr; infinite as in the paper's
            formula, which has no bound.
        min_lr, max_lr: the range of the lr.
        probe_options: ``backend``, ``reduce_group``, ``process_group`` of :class:`LineProbe`.

    Raises:
        ValueError: for another optimizer, several lrs, or options out of range.

    Source: arXiv 2004.03260. Ours: the choice of δ, that an unfit parabola keeps the lr, ``every``
    and ``bound``.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import LQA
        >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
        >>> opt = torch.optim.SGD([weight], lr=1e-3)
        >>> tuner = LQA(opt)
        >>> (2 * weight**2).sum().backward()
        >>> _ = tuner.step(lambda: (2 * weight**2).sum())
        >>> round(tuner.get_last_lr()[0], 3)  # 1/4 is the minimizer of 2·w²
        0.25
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        every: int = 1,
        bound: float = math.inf,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
        **probe_options: Any,
    ) -> None:
        if not bound >= 1:
            raise ValueError(f"bound must be 1 or more, got {bound}")
        check_plain_sgd(optimizer)
        super().__init__(optimizer, model, every, min_lr, max_lr, **probe_options)
        self.bound = bound

    def _factor(self, closure: Closure) -> float | None:
        check_plain_sgd(self.optimizer)
        space = self.probe.space
        g = space.gradients()
        if g is None:
            raise ValueError("expected gradients: call it after backward() and before step()")
        lr = self.get_last_lr()[0]
        with torch.no_grad():
            d = space.zeros()
            # d is the step at the present lr, so that r = ±1 is at the distance δ.
            space.axpby(d, g, 0.0, lr)
            reach = float(space.abs_max(d).max())
        if not 0 < reach < math.inf:
            return None
        self.losses = self.probe.along(closure, space.copy(), d, (-1.0, 0.0, 1.0))
        fit = parabola((-1.0, 0.0, 1.0), self.losses)
        if fit is None or not fit.convex:
            return None
        return finite(min(self.bound, max(1 / self.bound, fit.minimizer)))


def check_plain_sgd(optimizer: Optimizer) -> None:
    """Raise ValueError unless an optimizer's step is −lr·g with one lr."""
    if not isinstance(optimizer, torch.optim.SGD) or any(
        group["momentum"] or group["weight_decay"] or group["maximize"]
        for group in optimizer.param_groups
    ):
        raise ValueError(
            "expected torch.optim.SGD without momentum, weight decay and maximize, "
            f"got {type(optimizer).__name__}: GeN takes any optimizer"
        )
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        raise ValueError(f"expected one lr for all groups, got {sorted(rates)}")
