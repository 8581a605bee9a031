"""ExtrapolatedSGD: SGD with the gradient evaluated ahead, along the last gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..options import number
from .vector_optimizer import GroupGradients, VectorOptimizer, check_lr


class ExtrapolatedSGD(VectorOptimizer):
    """Evaluate the gradient ahead along the last one, and step from the present weights.

    x_half = x − extrapolation·lr·g_prev;   g = ∇f(x_half);

    d = momentum·d + g + weight_decay·x;   x −= lr·d;   g_prev = g.

    A weight that has had no gradient yet is not moved ahead, so the first step is plain SGD.

    Args:
        params: weights or param groups; all options may differ between groups.
        lr: step size, 0 or more.
        momentum: in [0, 1).
        weight_decay: 0 or more; applied to x, not to x_half.
        extrapolation: distance ahead as a multiple of lr, 0 or more; 0 is plain SGD.
        backend: "auto" or the name of a backend.
        reduce_group: the process group over which plain weights are sharded, or None.

    Raises:
        ValueError: for options out of range, or a backend that does not serve the weights' device.

    The state is g_prev, and with momentum d, in float32 (float64 for float64 weights); during a
    step also a copy of the weights. A step calls the closure once.

    Source: arXiv 2006.05720, whose text was not available: the method follows its abstract and
    citing papers. Ours: the distance ahead as a multiple of lr, its default, and the treatment of
    momentum and weight decay.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import ExtrapolatedSGD
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> opt = ExtrapolatedSGD([weight], lr=0.1)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (weight**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> losses = [opt.step(closure).item() for _ in range(30)]
        >>> losses[-1] < 1e-3
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        extrapolation: float = 1.0,
        backend: str = "auto",
        reduce_group: Any = None,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "extrapolation": extrapolation,
        }
        super().__init__(params, options, backend, reduce_group)

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError for a group's options that are out of range."""
        check_lr(options["lr"])
        number("momentum", options["momentum"], 0, 1, below=True)
        number("weight_decay", options["weight_decay"], 0)
        number("extrapolation", options["extrapolation"], 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: clears gradients, computes the loss, does the backward pass and returns the
                loss, as for torch's LBFGS.

        Returns:
            The loss at x_half.

        Raises:
            ValueError: without a closure, or for a closure that leaves no gradients or unusable
                ones. The weights are unchanged then, as they are after an error in the closure.
        """
        if closure is None:
            raise ValueError("ExtrapolatedSGD needs a closure that returns the loss, got None")
        loss = self._evaluate_ahead(closure)
        found = self._collect_gradients()
        if not found:
            raise ValueError("the closure must do the backward pass, got no gradients")
        for item in found:
            self._step_group(item)
        return loss

    def _evaluate_ahead(self, closure: Callable[[], Any]) -> Any:
        """Call the closure at x_half; restore the weights."""
        moved = []
        try:
            for group in self.param_groups:
                distance = group["extrapolation"] * float(group["lr"])
                known = [
                    p
                    for p in group["params"]
                    if p.requires_grad and "last_gradient" in self.state.get(p, {})
                ]
                if known and distance:
                    space = self._space(known)
                    last, w = self._state_vector(space, "last_gradient"), space.copy()
                    moved.append((space, w))
                    space.step_along(space.weights, w, last, distance)
            with torch.enable_grad():
                return closure()
        finally:
            for space, w in moved:
                space.restore(w)

    def _step_group(self, item: GroupGradients) -> None:
        group, space, g = item.group, item.space, item.gradients
        d = last = self._state_vector(space, "last_gradient")
        space.axpby(last, g, 0.0, 1.0)
        if group["momentum"]:
            d = self._state_vector(space, "momentum_buffer")
            space.axpby(d, g, group["momentum"], 1.0)
        elif group["weight_decay"]:
            d = space.zeros()
            space.axpby(d, g, 0.0, 1.0)
        if group["weight_decay"]:
            space.axpby(d, space.weights, 1.0, group["weight_decay"])
        space.step_along(space.weights, space.weights, d, float(group["lr"]))
