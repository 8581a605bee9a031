"""Lion, which torch does not have: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from .backends.formulas import coefficients, lion


class Lion(Optimizer):
    """Step by the sign of an interpolation between momentum and gradient.

    x −= lr·(sign(β₁·m + (1−β₁)·g) + weight_decay·x);  m = β₂·m + (1−β₂)·g.

    Args:
        params: weights or param groups.
        lr: learning rate, 0 or more.
        betas: (β₁, β₂), each in [0, 1).
        weight_decay: decoupled weight decay, 0 or more.
        maximize: maximize the objective instead of minimizing it.

    Raises:
        ValueError: for options out of range.

    Source: arXiv 2302.06675, Algorithm 2.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = Lion([weight], lr=1e-4)
        >>> (weight ** 2).sum().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must be 0 or more, got {lr}")
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            decay = group["weight_decay"]
            c = coefficients([float(group["lr"]), *group["betas"], 0.0, 0.0, decay, 0.0, 1.0], 0.0)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                g = -p.grad if group["maximize"] else p.grad
                u, moved = lion(g, p, state["exp_avg"], c)
                state["exp_avg"].copy_(moved)
                p.add_(u)
        return loss
