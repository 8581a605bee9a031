"""LineProbe: the loss along a line through the weights, and the parabola through what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..vectors.space import Space, Vector
from .snapshot import Buffers, Generators, OptimizerState, no_gradients, reshard

Closure = Callable[[], Tensor]


class Parabola(NamedTuple):
    """L(r) ≈ level − slope·r + ½·curvature·r², and R², the part of the losses' spread in it."""

    level: float
    slope: float
    curvature: float
    r_squared: float

    @property
    def minimizer(self) -> float:
        """r* = slope/curvature; of three points at −1, 0, 1: ½(L₋ − L₊)/(L₋ − 2L₀ + L₊)."""
        return self.slope / self.curvature

    @property
    def convex(self) -> bool:
        """Whether it opens upwards and falls at r = 0, so that its minimizer is a step ahead."""
        return self.curvature > 0 and self.slope > 0


NOTHING = 1e-13
"""What the fit's own roundings leave of a curvature that is 0, as a part of the losses' range."""


def parabola(multiples: Sequence[float], losses: Sequence[float]) -> Parabola | None:
    """Return the least-squares parabola through three or more points, or None if any loss is not
    finite."""
    if not all(map(math.isfinite, losses)):
        return None
    # Differences first: of losses that lie on a line the curvature is then 0, or nearly so.
    base = losses[0]
    found = numpy.asarray(losses) - base
    half, minus, level = numpy.polyfit(multiples, found, 2).tolist()
    residual = found - numpy.polyval([half, minus, level], multiples)
    spread = float(((found - found.mean()) ** 2).sum())
    r_squared = 1 - float((residual**2).sum()) / spread if spread > 0 else 0.0
    reach = max(map(abs, multiples))
    if abs(half) * reach**2 <= NOTHING * float(numpy.abs(found).max()):
        half = 0.0
    return Parabola(base + level, -minus, 2 * half, r_squared)


class LineProbe:
    """Measure the loss where the optimizer would be after a step of several sizes.

    L(r) = loss at x − r·d, d being the step that the optimizer is about to take at its present lr:
    r = 1 is that step, 0 the weights as they are, −1 the step the other way.

    Afterwards weights, gradients, the optimizer's state and param_groups, the model's buffers and
    the random generators are as before, to the bit. Every point sees the same random numbers.

    Args:
        optimizer: any torch optimizer whose ``step()`` needs no closure, ours among them.
        model: its buffers (batch norm's statistics) are kept; None where it has none.
        backend: "auto" or a backend's name.
        reduce_group: the process group over which plain weights are sharded, or None.
        process_group: the ranks over whose batches losses are averaged; None for all of them.

    Raises:
        ValueError: for a backend that does not serve the weights' device.

    While it runs it holds a copy of the weights, of the optimizer's state, and the direction d in
    float32 (float64 for float64 weights). Hooks on the optimizer's step run once.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import LineProbe
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
        self.space  # noqa: B018  an unfit backend is to be named now

    @property
    def space(self) -> Space:
        """The weights that a step may move: those that require gradients, or still have one."""
        groups = self.optimizer.param_groups
        held = [p for group in groups for p in group["params"]]
        weights = [p for p in held if p.requires_grad or p.grad is not None]
        space = self._space
        known = space is not None and [id(p) for p in space.parameters] == [id(p) for p in weights]
        if space is None or not known or not space.fits():
            space = self._space = Space(weights, self.backend, self.reduce_group)
        return space

    def __call__(self, closure: Closure, multiples: Sequence[float] = (-1, 0, 1)) -> list[float]:
        """Return the losses at x − r·d for each r of ``multiples``.

        Call it after the backward pass and before the optimizer's step.

        Args:
            closure: evaluates the model and returns the loss, as torch's LBFGS takes it. It is
                called without gradients: one that also does the backward pass says
                ``if loss.requires_grad: loss.backward()``. Of a batch that it draws itself, every
                point must see the same.

        Raises:
            ValueError: if no weight has a gradient.
        """
        if getattr(self.optimizer, "_release", None) is not None:
            raise ValueError("expected gradients, got an optimizer that releases them: no probes")
        space = self.space
        if space.gradients() is None:
            raise ValueError("expected gradients: call it after backward() and before step()")
        w = space.copy()
        return self.along(closure, w, self.direction(w), multiples)

    @torch.no_grad()
    def direction(self, w: Vector) -> Vector:
        """Return d = w − x', x' being where ``optimizer.step()`` leads; all is put back.

        Args:
            w: a copy of the weights.
        """
        space, opt = self.space, self.optimizer
        kept, generators = OptimizerState(opt), Generators(x.device for x in space.weights)
        grads = [p.grad for p in space.parameters]
        # Hooks may write them, and torch's foreach SGD adds Nesterov's momentum into them.
        copies = [None if g is None else g.clone() for g in grads]
        try:
            opt.step()
            d = space.zeros()
            space.difference_dots(d, w, space.weights)
        finally:
            for p, g, copy in zip(space.parameters, grads, copies, strict=True):
                p.grad = g if g is None or copy is None else g.copy_(copy)
            put_back(space, w)
            kept.restore()
            generators.restore()
        return d

    @torch.no_grad()
    def along(
        self, closure: Closure, w: Vector, d: Vector, multiples: Sequence[float]
    ) -> list[float]:
        """Return the losses at w − r·d for each r, and put everything back.

        Args:
            w: a copy of the weights.
            d: a vector in the dtype of the arithmetic: see :meth:`Space.zeros`.
        """
        space = self.space
        generators, buffers = Generators(x.device for x in space.weights), Buffers(self.model)
        models = [] if self.model is None else self.model.parameters()
        everybody = list(dict.fromkeys([*space.parameters, *models]))
        losses = []
        try:
            for r in multiples:
                generators.restore()
                if r == 0:
                    put_back(space, w)
                else:
                    space.step_along(space.weights, w, d, float(r))
                reshard(self.model)
                with no_gradients(everybody):
                    losses.append(mean_loss(closure(), self.process_group))
                buffers.restore()
        finally:
            put_back(space, w)
            reshard(self.model)
            buffers.restore()
            generators.restore()
        return torch.stack(losses).tolist()


@torch.no_grad()
def put_back(space: Space, w: Vector) -> None:
    """Give the weights the bits of their copy; autograd counts it as a write."""
    torch._foreach_copy_(space.weights, w)
    space.written()


def mean_loss(loss: Any, group: Any = None) -> Tensor:
    """Return the loss as a float64 number, averaged over the ranks of ``group``.

    Ranks see other batches, and must decide alike.

    Raises:
        ValueError: if a closure returned something else than one number.
    """
    number = loss.detach() if torch.is_tensor(loss) else torch.tensor(loss, dtype=torch.float64)
    number = number.double()
    if number.numel() != 1:
        raise ValueError(f"a closure must return one number, got a shape {tuple(number.shape)}")
    number = number.reshape(())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        number = number.clone()
        torch.distributed.all_reduce(number, group=group)
        number /= torch.distributed.get_world_size(group)
    return number
