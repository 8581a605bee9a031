"""LQA: set the lr of plain SGD to the minimizer of a parabola along the gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .probe import parabola
from .probe_scheduler import ProbeScheduler
from .trial import Closure

MULTIPLES = (-1.0, 0.0, 1.0)


class LQA(ProbeScheduler):
    """Set plain SGD's lr to the minimizer of a local quadratic approximation.

    With e = g/max|g|, a distance δ and L± the loss at x ∓ δ·e, every step sets

    lr = (δ/2)·(L₋ − L₊)/(L₋ − 2L₀ + L₊)/max|g|

    if curvature and slope are positive; otherwise the lr is kept. δ is lr·max|g|, the largest
    element of the last step, so that the parabola is fitted at the distance where it is used.

    Args:
        optimizer: torch.optim.SGD without momentum and weight decay; its lr only sets the first δ.
        model: the model whose buffers are restored after a probe, if it has any.
        every: steps from one probe to the next.
        bound: the largest factor by which one probe changes the lr; infinite by default, because
            the paper's formula has no bound.
        min_lr, max_lr: the range of the lr.
        probe_options: ``backend``, ``reduce_group`` and ``process_group`` of :class:`LineProbe`.

    Raises:
        ValueError: for another optimizer, several lrs, or options out of range.

    Source: arXiv 2004.03260. Ours: the choice of δ, keeping the lr if the parabola has no minimum
    ahead, ``every`` and ``bound``.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import LQA
        >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
        >>> opt = torch.optim.SGD([weight], lr=1e-3)
        >>> tuner = LQA(opt)
        >>> (2 * weight**2).sum().backward()
        >>> _ = tuner.step(lambda: (2 * weight**2).sum())
        >>> round(tuner.get_last_lr()[0], 3)  # 2·w² has its minimum at a step of lr 1/4
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

    def _lr_factor(self, closure: Closure) -> float | None:
        check_plain_sgd(self.optimizer)
        g, space = self.probe.gradients(), self.probe.space
        lr = self.get_last_lr()[0]
        with torch.no_grad():
            d = space.zeros()
            # d is the step at the present lr, so r = ±1 is at the distance δ.
            space.axpby(d, g, 0.0, lr)
            distance = float(space.abs_max(d).max())
        if not 0 < distance < math.inf:
            return None
        self.losses = self.probe.along(closure, space.copy(), d, MULTIPLES)
        fit = parabola(MULTIPLES, self.losses)
        if fit is None or not fit.convex:
            return None
        factor = min(self.bound, max(1 / self.bound, fit.minimizer))
        return factor if math.isfinite(factor) and factor > 0 else None


def check_plain_sgd(optimizer: Optimizer) -> None:
    """Raise ValueError unless an optimizer's step is −lr·g with one lr."""
    if not isinstance(optimizer, torch.optim.SGD) or any(
        group["momentum"] or group["weight_decay"] or group["maximize"]
        for group in optimizer.param_groups
    ):
        raise ValueError(
            "LQA needs torch.optim.SGD without momentum, weight decay and maximize, "
            f"got {type(optimizer).__name__} with {_options(optimizer)}; GeN takes any optimizer"
        )
    lrs = {float(group["lr"]) for group in optimizer.param_groups}
    if len(lrs) > 1:
        raise ValueError(f"LQA needs one lr for all groups, got {sorted(lrs)}")


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    names = ("momentum", "weight_decay", "maximize")
    return [{k: group[k] for k in names if k in group} for group in optimizer.param_groups]
