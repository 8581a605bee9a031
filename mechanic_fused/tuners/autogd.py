"""AutoGD: gradient descent with the best of three step sizes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..options import number
from .probe_scheduler import set_lr
from .snapshot import GeneratorStates
from .trial import mean_loss, trial_losses
from .vector_optimizer import VectorOptimizer, check_lr


class AutoGD(VectorOptimizer):
    """Descend along the gradient with the best of three step sizes; for deterministic objectives.

    A step size c in {γ/2, γ, 2γ} is accepted if f(x − c·g) ≤ f(x) − η·c·‖g‖². The accepted c with
    the lowest f is taken and becomes γ; if none is accepted, x stays and γ ← γ/4.

    Args:
        params: weights, or one param group.
        lr: the initial γ. Any size works, at the cost of one step per factor of 4.
        eta: η, the fraction of the decrease predicted by the slope that is required, in (0, 1).
        model: the model whose buffers are restored after each trial, if it has any.
        backend: "auto" or the name of a backend.
        reduce_group: the process group over which plain weights are sharded, or None.
        process_group: the ranks over which f is averaged; None for all.

    Raises:
        ValueError: for options out of range, or several groups.

    Memory during a step: a copy of the weights, and the gradient in float32 (float64 for float64
    weights). A step calls the closure once with gradients and three times without.

    Source: arXiv 2510.09923 at second hand; η = 1e-4 is probable, not certain. Every call of the
    closure must evaluate the same objective: with a new batch each time the test compares noise.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import AutoGD
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> opt = AutoGD([weight], lr=100.0)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (weight**2).sum()
        ...     if loss.requires_grad:
        ...         loss.backward()
        ...     return loss
        >>> for _ in range(30):
        ...     _ = opt.step(closure)
        >>> bool(weight.abs().max() < 1e-3)
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        eta: float = 1e-4,
        model: nn.Module | None = None,
        backend: str = "auto",
        reduce_group: Any = None,
        process_group: Any = None,
    ) -> None:
        self._model, self._process_group = model, process_group
        super().__init__(params, {"lr": lr, "eta": eta}, backend, reduce_group)

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError for a group's options that are out of range."""
        check_lr(options["lr"], above=True)
        number("eta", options["eta"], 0, 1, above=True, below=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the only group of weights.

        Raises:
            ValueError: for options out of range, or a second group: all weights move along one
                line.
        """
        if self.param_groups:
            raise ValueError("AutoGD has one param group, got another")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep."""
        held = {"_model": self._model, "_process_group": self._process_group}
        return {**super().__getstate__(), **held}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or keep the weights.

        Args:
            closure: clears gradients, returns the loss and, if ``loss.requires_grad``, does the
                backward pass, as for torch's LBFGS.

        Returns:
            The loss before the step.

        Raises:
            ValueError: without a closure, or for a closure that leaves no gradients.
        """
        if closure is None:
            raise ValueError("AutoGD needs a closure that returns the loss, got None")
        group = self.param_groups[0]
        space = self._space([p for p in group["params"] if p.requires_grad])
        generators = GeneratorStates(x.device for x in space.weights)
        with torch.enable_grad():
            loss = closure()
        g = space.gradients()
        if g is None:
            raise ValueError("the closure must do the backward pass, got no gradients")
        d = space.zeros()
        space.axpby(d, g, 0.0, 1.0)
        squared_norm = space.dots(g, g, d)[3]
        gamma = float(group["lr"])
        candidates = [gamma / 2, gamma, 2 * gamma]
        w, process_group = space.copy(), self._process_group
        numbers = [mean_loss(loss, process_group)]
        with trial_losses(
            closure,
            space,
            w,
            d,
            model=self._model,
            process_group=process_group,
            generators=generators,
        ) as loss_at:
            numbers += [loss_at(c) for c in candidates]
        numbers.append(squared_norm.to(numbers[0].device))
        best = choose(candidates, torch.stack(numbers), group["eta"])
        if best is not None:
            space.step_along(space.weights, w, d, best)
            set_lr(group, best)
        elif float(squared_norm):
            # At an optimum no step size is informative, and γ would decay to 0.
            set_lr(group, max(gamma / 4, sys.float_info.min))
        return loss


def choose(candidates: list[float], numbers: torch.Tensor, eta: float) -> float | None:
    """Return the accepted candidate with the lowest f, or None.

    Args:
        candidates: the step sizes.
        numbers: f(x), f at each candidate, ‖g‖²; read from the device at once.
        eta: the fraction of the predicted decrease that is required.
    """
    f_here, *f_there, squared_norm = numbers.tolist()
    if squared_norm == 0:
        return None
    accepted = [
        (f, c)
        for f, c in zip(f_there, candidates, strict=True)
        if math.isfinite(f) and f <= f_here - eta * c * squared_norm
    ]
    return min(accepted)[1] if accepted else None
