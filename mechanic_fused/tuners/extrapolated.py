"""ExtrapolatedSGD: SGD with the gradient taken a step ahead, along the last one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .probe import put_back
from .vector_optimizer import Ready, VectorOptimizer


class ExtrapolatedSGD(VectorOptimizer):
    """Take the gradient where the last one points to, and step from where the weights were.

    x_half = x − extrapolation·lr·g_prev;   g = ∇f(x_half);

    d = momentum·d + g + weight_decay·x;   x −= lr·d;   g_prev = g.

    A weight that has had no gradient yet is not moved ahead, so the first step is plain SGD.

    Args:
        params: weights or param groups; all options may differ between groups.
        lr: step size, 0 or more.
        momentum: in [0, 1).
        weight_decay: 0 or more; taken of x, not of x_half.
        extrapolation: how far ahead, in steps of size lr; 0 or more, and 0 is plain SGD.
        backend: "auto" or a backend's name.
        reduce_group: the process group over which plain weights are sharded, or None.

    Raises:
        ValueError: for options out of range, or a backend that does not serve the weights' device.

    Beside the weights it keeps g_prev, and with momentum d, in float32 (float64 for float64
    weights), and during a step a copy of the weights. The closure is called once a step.

    Source: arXiv 2006.05720, whose text could not be had: this is the method as its abstract and
    others outline it. Ours: that the distance ahead is a multiple of the lr, its default, and how
    momentum and weight decay go along.

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

    def check(self, options: dict[str, Any]) -> None:
        """Raise ValueError for options of a group that are out of range."""
        for name in ("lr", "weight_decay", "extrapolation"):
            if not 0 <= options[name] < math.inf:
                raise ValueError(f"{name} must be finite and 0 or more, got {options[name]}")
        if not 0 <= options["momentum"] < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {options['momentum']}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: clears gradients, computes the loss, does the backward pass and returns the
                loss, as torch's LBFGS takes it.

        Returns:
            The loss at x_half.

        Raises:
            ValueError: without a closure, or if it left no gradients or unfit ones. The weights
                are as before then, as they are after an error of the closure's own.
        """
        if closure is None:
            raise ValueError("ExtrapolatedSGD needs a closure that returns the loss, got None")
        loss = self._ahead(closure)
        ready = self._ready()
        if not ready:
            raise ValueError("expected gradients: the closure must do the backward pass")
        for item in ready:
            self._move(item)
        return loss

    def _ahead(self, closure: Callable[[], Any]) -> Any:
        """Call the closure at x_half, and put the weights back."""
        held = []
        try:
            for group in self.param_groups:
                reach = group["extrapolation"] * float(group["lr"])
                known = [
                    p
                    for p in group["params"]
                    if p.requires_grad and "last_gradient" in self.state.get(p, {})
                ]
                if known and reach:
                    space = self._space(known)
                    last, w = self._vector(space, "last_gradient"), space.copy()
                    held.append((space, w))
                    space.step_along(space.weights, w, last, reach)
            with torch.enable_grad():
                return closure()
        finally:
            for space, w in held:
                put_back(space, w)

    def _move(self, item: Ready) -> None:
        _, group, space, g = item
        d = last = self._vector(space, "last_gradient")
        space.axpby(last, g, 0.0, 1.0)
        if group["momentum"]:
            d = self._vector(space, "momentum_buffer")
            space.axpby(d, g, group["momentum"], 1.0)
        elif group["weight_decay"]:
            d = space.zeros()
            space.axpby(d, g, 0.0, 1.0)
        if group["weight_decay"]:
            space.axpby(d, space.weights, 1.0, group["weight_decay"])
        space.step_along(space.weights, space.weights, d, float(group["lr"]))
