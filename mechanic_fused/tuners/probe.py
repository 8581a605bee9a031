"""LineProbe: the loss along a line through the weights, and the parabola through such losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn
from torch.optim import Optimizer

from ..optimizer import Mechanized
from ..vectors.space import Space, Vector
from .snapshot import GeneratorStates, OptimizerState
from .trial import Closure, trial_losses

CURVATURE_ROUNDING = 1e-13
"""The rounding error of a fitted ½·curvature, as a fraction of the range of the losses."""


class Parabola(NamedTuple):
    """L(r) ≈ level − slope·r + ½·curvature·r², and R², the fraction of the variance it explains."""

    level: float
    slope: float
    curvature: float
    r_squared: float

    @property
    def minimizer(self) -> float:
        """r* = slope/curvature; for points at −1, 0, 1 it is ½(L₋ − L₊)/(L₋ − 2L₀ + L₊)."""
        return self.slope / self.curvature

    @property
    def convex(self) -> bool:
        """Whether it opens upwards and falls at r = 0, so that its minimizer is ahead."""
        return self.curvature > 0 and self.slope > 0


def parabola(multiples: Sequence[float], losses: Sequence[float]) -> Parabola | None:
    """Fit a parabola to three or more losses by least squares.

    Args:
        multiples: r of each loss.
        losses: the losses.

    Returns:
        The parabola, or None if a loss is not finite.
    """
    if not all(map(math.isfinite, losses)):
        return None
    # Differences first, so that losses on a line give a curvature of 0, or nearly so.
    base = losses[0]
    rises = numpy.asarray(losses) - base
    half, minus, level = numpy.polyfit(multiples, rises, 2).tolist()
    residual = rises - numpy.polyval([half, minus, level], multiples)
    spread = float(((rises - rises.mean()) ** 2).sum())
    r_squared = 1 - float((residual**2).sum()) / spread if spread > 0 else 0.0
    largest = max(map(abs, multiples))
    if abs(half) * largest**2 <= CURVATURE_ROUNDING * float(numpy.abs(rises).max()):
        half = 0.0
    return Parabola(base + level, -minus, 2 * half, r_squared)


class LineProbe:
    """Measure the loss at several multiples of the step that the optimizer is about to take.

    L(r) = loss at x − r·d, where x − d is where ``optimizer.step()`` would lead: r = 1 is the step
    itself, 0 the present weights, −1 the step in the opposite direction.

    Afterwards weights, gradients, the optimizer's state and param groups, the model's buffers and
    the random generators are as before, bit by bit. Every point draws the same random numbers.

    Args:
        optimizer: any torch optimizer, a mechanized one included, whose ``step()`` needs no
            closure. Hooks on the step run once per probe.
        model: the model whose buffers (batch norm's statistics) are restored, if it has any.
        backend: "auto" or the name of a backend.
        reduce_group: the process group over which plain weights are sharded, or None.
        process_group: the ranks over which losses are averaged; None for all.

    Raises:
        ValueError: for a backend that does not serve the weights' device.

    Memory during a probe: a copy of the weights, a copy of the optimizer's state, and d in float32
    (float64 for float64 weights).

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import LineProbe
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> probe = LineProbe(opt, model)
        >>> z = torch.ones(4, 3)
        >>> model(z).square().mean().backward()
        >>> before, after = probe(lambda: model(z).square().mean(), (0, 1))
        >>> after < before
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        backend: str = "auto",
        reduce_group: Any = None,
        process_group: Any = None,
    ) -> None:
        self.optimizer, self.model = optimizer, model
        self.backend, self.reduce_group = backend, reduce_group
        self.process_group = process_group
        self._space: Space | None = None
        self.space  # noqa: B018  raises now for an unsuitable backend

    @property
    def space(self) -> Space:
        """The weights that a step may move: those that require gradients or still have one."""
        groups = self.optimizer.param_groups
        held = [p for group in groups for p in group["params"]]
        weights = [p for p in held if p.requires_grad or p.grad is not None]
        space = self._space
        known = space is not None and [id(p) for p in space.parameters] == [id(p) for p in weights]
        if space is None or not known or not space.fits():
            space = self._space = Space(weights, self.backend, self.reduce_group)
        return space

    def __call__(self, closure: Closure, multiples: Sequence[float] = (-1, 0, 1)) -> list[float]:
        """Return the losses at x − r·d for each r in ``multiples``.

        Call it after the backward pass and before the optimizer's step.

        Args:
            closure: evaluates the model and returns the loss; it is called without gradients. A
                closure that also does the backward pass, as for torch's LBFGS, must make it depend
                on ``loss.requires_grad``. All points must see the same batch.
            multiples: the values of r.

        Raises:
            ValueError: if no weight has a gradient.
        """
        self.gradients()
        w = self.space.copy()
        return self.along(closure, w, self.direction(w), multiples)

    def gradients(self) -> Vector:
        """Return the gradients of :attr:`space`; raise ValueError if no weight has one."""
        if isinstance(self.optimizer, Mechanized) and self.optimizer.releases_gradients:
            raise ValueError(
                "LineProbe cannot be used with release_gradients(): gradients are freed in the "
                "backward pass"
            )
        gradients = self.space.gradients()
        if gradients is None:
            raise ValueError(
                "a probe needs gradients: expected a call after backward() and before step(), "
                "got weights without gradients"
            )
        return gradients

    @torch.no_grad()
    def direction(self, w: Vector) -> Vector:
        """Return d = w − x', where ``optimizer.step()`` leads to x'; the step is taken back.

        Args:
            w: a copy of the weights.
        """
        space, opt = self.space, self.optimizer
        saved, generators = OptimizerState(opt), GeneratorStates(x.device for x in space.weights)
        grads = [p.grad for p in space.parameters]
        # Hooks may write gradients, and torch's foreach SGD adds Nesterov's momentum to them.
        copies = [None if g is None else g.clone() for g in grads]
        try:
            opt.step()
            d = space.zeros()
            space.difference_dots(d, w, space.weights)
        finally:
            for p, g, copy in zip(space.parameters, grads, copies, strict=True):
                p.grad = g if g is None or copy is None else g.copy_(copy)
            space.restore(w)
            saved.restore()
            generators.restore()
        return d

    @torch.no_grad()
    def along(
        self, closure: Closure, w: Vector, d: Vector, multiples: Sequence[float]
    ) -> list[float]:
        """Return the losses at w − r·d for each r in ``multiples``; restore everything.

        Args:
            closure: evaluates the model and returns the loss.
            w: a copy of the weights.
            d: a vector in the dtype of the arithmetic: see :meth:`Space.zeros`.
            multiples: the values of r.
        """
        group = self.process_group
        with trial_losses(
            closure, self.space, w, d, model=self.model, process_group=group
        ) as loss_at:
            losses = [loss_at(r) for r in multiples]
        return torch.stack(losses).tolist()
