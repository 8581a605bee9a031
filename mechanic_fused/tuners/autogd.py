"""AutoGD: gradient descent that tries three step sizes and keeps what works."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .probe import mean_loss, put_back
from .probe_scheduler import set_lr
from .snapshot import Buffers, Generators, no_gradients, reshard
from .vector_optimizer import VectorOptimizer


class AutoGD(VectorOptimizer):
    """Descend along the gradient with the best of three step sizes, for deterministic objectives.

    Of c in {γ/2, γ, 2γ} those pass for which f(x − c·g) ≤ f(x) − η·c·‖g‖². x moves to the passing
    one of lowest f, and γ becomes its c; if none passes x stays, and γ ← γ/4.

    Args:
        params: weights, or one param group.
        lr: γ at the start; any number will do, at the cost of a step for each factor of 4.
        eta: η, how much of the slope's promise a step must keep, in (0, 1).
        model: its buffers are kept while candidates are tried; None where it has none.
        backend: "auto" or a backend's name.
        reduce_group: the process group over which plain weights are sharded, or None.
        process_group: the ranks over whose batches f is averaged; None for all of them.

    Raises:
        ValueError: for options out of range, or several groups.

    Memory: a copy of the weights, and one of gradients that are not float32 or float64. A step
    takes the closure once with gradients and three times without.

    Source: arXiv 2510.09923, at second hand; η = 1e-4 is probable, not certain. The objective must
    be the same at each call: on batches drawn anew the test compares noise.

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

    def check(self, options: dict[str, Any]) -> None:
        """Raise ValueError for options of a group that are out of range."""
        if not 0 < options["lr"] < math.inf:
            raise ValueError(f"lr must be a finite number above 0, got {options['lr']}")
        if not 0 < options["eta"] < 1:
            raise ValueError(f"eta must lie in (0, 1), got {options['eta']}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the first group of weights.

        Raises:
            ValueError: for options out of range, or a second group: the line is one.
        """
        if self.param_groups:
            raise ValueError("expected one param group, got another")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        held = {"_model": self._model, "_process_group": self._process_group}
        return {**super().__getstate__(), **held}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or stay.

        Args:
            closure: clears gradients, returns the loss and, with ``if loss.requires_grad:``, does
                the backward pass, as torch's LBFGS takes it.

        Returns:
            The loss before the step.

        Raises:
            ValueError: without a closure, or if it left no gradients.
        """
        if closure is None:
            raise ValueError("AutoGD needs a closure that returns the loss, got None")
        group = self.param_groups[0]
        space = self._space([p for p in group["params"] if p.requires_grad])
        generators = Generators(x.device for x in space.weights)
        with torch.enable_grad():
            loss = closure()
        after, buffers = Generators(x.device for x in space.weights), Buffers(self._model)
        g = space.gradients()
        if g is None:
            raise ValueError("expected gradients: the closure must do the backward pass")
        d = space.zeros()
        space.axpby(d, g, 0.0, 1.0)
        squares = space.dots(g, g, d)[3]
        gamma = float(group["lr"])
        candidates = [gamma / 2, gamma, 2 * gamma]
        w = space.copy()
        found = [mean_loss(loss, self._process_group)]
        try:
            for c in candidates:
                space.step_along(space.weights, w, d, c)
                generators.restore()
                reshard(self._model)
                with no_gradients(space.parameters):
                    found.append(mean_loss(closure(), self._process_group))
                buffers.restore()
        finally:
            put_back(space, w)
            reshard(self._model)
            buffers.restore()
            after.restore()
        best = choose(candidates, torch.stack([*found, squares.to(found[0].device)]), group["eta"])
        if best is not None:
            space.step_along(space.weights, w, d, best)
            set_lr(group, best)
        elif float(squares):
            # At an optimum no step tells anything, and γ would fall to 0 for ever.
            set_lr(group, max(gamma / 4, sys.float_info.min))
        return loss


def choose(candidates: list[float], numbers: torch.Tensor, eta: float) -> float | None:
    """Return the passing candidate of lowest f, or None.

    Args:
        numbers: f(x), f at each candidate, ‖g‖².
    """
    here, *there, squares = numbers.tolist()
    if squares == 0:
        return None
    passing = [
        (f, c)
        for f, c in zip(there, candidates, strict=True)
        if math.isfinite(f) and f <= here - eta * c * squares
    ]
    return min(passing)[1] if passing else None
