"""CGQ: momentum SGD whose lr and momentum come from occasional line searches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import nn

from ..vectors.space import Space, Vector
from .probe import mean_loss, put_back
from .probe_scheduler import set_lr
from .snapshot import Buffers, Generators, no_gradients, reshard
from .vector_optimizer import VectorOptimizer

# The options that all groups have in common: the line is one through all weights.
SHARED = ("lr", "momentum", "probability", "trial", "bound", "seed", "draws")
# The largest β that a search may find, as in the authors' code.
MOST = 0.8


class CGQ(VectorOptimizer):
    """Step as momentum SGD, and learn its lr and momentum by line searches now and then.

    p = μ·p + g + weight_decay·x;   x −= lr·p. With ``probability`` a step is a search:

    β = clamp(⟨g, g − g_last⟩/‖g_last‖², 0, 0.8), g_last being the last search's gradient;

    μ ← (μ + β)/2;   p = β·p + g + weight_decay·x;   x −= α·p;   lr ← (lr + α)/2,

    α = min(−b/2a, bound) of the least-squares parabola a·t² + b·t + c through the losses at x − t·p
    that are known and the slope −⟨g, p⟩ at 0: first those at t = 0 and t = ``trial``; where the
    loss at α is not below that at 0, all three once more. If a ≤ 0, b ≥ 0, anything is not finite,
    or no α lowers the loss, the step is made with the lr and the lr stays.

    Args:
        params: weights or param groups; only ``weight_decay`` may differ between groups.
        lr: step size at the start, 0 or more; the learned one stands in param_groups.
        momentum: μ at the start, in [0, 1); the learned one stands in param_groups.
        weight_decay: 0 or more; the searches see the closure's loss, without it.
        probability: of a search in each step, in [0, 1].
        trial: the first t, above 0.
        bound: the largest α, above 0.
        seed: of the draws; the same on all ranks.
        model: its buffers are kept during a search; None where it has none.
        backend: "auto" or a backend's name.
        reduce_group: the process group over which plain weights are sharded, or None.
        process_group: the ranks over whose batches losses are averaged; None for all of them.

    Raises:
        ValueError: for options out of range, shared ones that differ between groups, or a backend
            that does not serve the weights' device.

    Beside the weights it keeps p in float32 (float64 for float64 weights) and, from the first
    search on, g_last in the weights' dtype; during a search also copies of the three. A step
    calls the closure once with gradients, a search one to three times more without.

    Source: arXiv 2106.11548 and its authors' code, with its defaults for ``probability``, ``trial``
    and ``bound``. Ours: one search over all groups at once; a parabola that does not fit keeps the
    lr; at most three more losses; the generators restored for each; weight decay is no part of the
    losses.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import CGQ
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> opt = CGQ([weight], lr=0.01, probability=0.5)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (weight**2).sum()
        ...     if loss.requires_grad:
        ...         loss.backward()
        ...     return loss
        >>> losses = [opt.step(closure).item() for _ in range(30)]
        >>> losses[-1] < 1e-3 * losses[0]
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        probability: float = 0.1,
        trial: float = 0.02,
        bound: float = 0.5,
        seed: int = 0,
        model: nn.Module | None = None,
        backend: str = "auto",
        reduce_group: Any = None,
        process_group: Any = None,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "draws": 0}
        options |= {"probability": probability, "trial": trial, "bound": bound, "seed": seed}
        self._model, self._process_group = model, process_group
        super().__init__(params, options, backend, reduce_group)

    def check(self, options: dict[str, Any]) -> None:
        """Raise ValueError for options of a group that are out of range."""
        for name in ("lr", "weight_decay"):
            if not 0 <= options[name] < math.inf:
                raise ValueError(f"{name} must be finite and 0 or more, got {options[name]}")
        for name in ("trial", "bound"):
            if not 0 < options[name] < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {options[name]}")
        if not 0 <= options["momentum"] < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {options['momentum']}")
        if not 0 <= options["probability"] <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {options['probability']}")
        if not isinstance(options["seed"], int) or options["seed"] < 0:
            raise ValueError(f"seed must be an integer of 0 or more, got {options['seed']!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights; they take over what has been learned.

        Raises:
            ValueError: for options out of range, or a shared one unlike the first group's.
        """
        if self.param_groups:
            shared = {name: self.param_groups[0][name] for name in SHARED}
            param_group = {**shared, **param_group}
            check_shared([shared, param_group])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: clears gradients, returns the loss and, with ``if loss.requires_grad:``, does
                the backward pass, as torch's LBFGS takes it. A search calls it again without
                gradients, with the random numbers of the first call; of a batch that it draws
                itself, all calls must see the same.

        Returns:
            The loss before the step.

        Raises:
            ValueError: without a closure, if it left no gradients or unfit ones, or if shared
                options have come to differ between groups; nothing has changed then.
        """
        if closure is None:
            raise ValueError("CGQ needs a closure that returns the loss, got None")
        check_shared(self.param_groups)
        options = self.param_groups[0]
        searches = drawn(options["seed"], options["draws"]) < options["probability"]
        devices = {p.device for group in self.param_groups for p in group["params"]}
        before = Generators(devices) if searches else None
        with torch.enable_grad():
            loss = closure()
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        space = self._space(weights) if weights else None
        g = space.gradients() if space else None
        if space is None or g is None:
            raise ValueError("expected gradients: the closure must do the backward pass")
        lr, momentum = float(options["lr"]), options["momentum"]
        p = self._vector(space, "momentum_buffer")
        if before is None:
            self._turn(space, g, p, momentum)
            space.step_along(space.weights, space.weights, p, lr)
        else:
            start = float(mean_loss(loss, self._process_group))
            last = self._vector(space, "last_gradient", narrow=True)
            held = [t.clone() for t in (*p, *last)]
            try:
                beta, slope = self._conjugate(space, g, p)
                found = self._search(space, closure, p, before, start, slope)
            except BaseException:
                torch._foreach_copy_([*p, *last], held)
                raise
            space.step_along(space.weights, space.weights, p, lr if found is None else found)
            lr = lr if found is None else (lr + found) / 2
            momentum = momentum if beta is None else (momentum + beta) / 2
        learned = {"momentum": momentum, "draws": options["draws"] + 1}
        for group in self.param_groups:
            set_lr(group, lr)
            group.update(learned)
        return loss

    def _turn(self, space: Space, g: Vector, p: Vector, beta: float) -> None:
        """p = β·p + g + weight_decay·x."""
        space.axpby(p, g, beta, 1.0)
        number = {id(weight): i for i, weight in enumerate(space.parameters)}
        for group in self.param_groups:
            held = [weight for weight in group["params"] if id(weight) in number]
            if group["weight_decay"] and held:
                part = self._space(held)
                mine = [p[number[id(weight)]] for weight in held]
                part.axpby(mine, part.weights, 1.0, group["weight_decay"])

    def _conjugate(self, space: Space, g: Vector, p: Vector) -> tuple[float | None, float]:
        """Turn p by the β of Polak and Ribière; return it (None: of no use) and the slope."""
        last = self._vector(space, "last_gradient", narrow=True)
        gg, gl, ll, gp = space.dots(g, last, p).tolist()
        torch._foreach_copy_(last, g)
        found = polak_ribiere(gg, gl, ll)
        beta = self.param_groups[0]["momentum"] if found is None else found
        self._turn(space, g, p, beta)
        if any(group["weight_decay"] for group in self.param_groups):
            # ⟨g, x⟩ is not among the sums above.
            return found, -float(space.dots(g, last, p)[3])
        return found, -(beta * gp + gg)

    def _search(
        self,
        space: Space,
        closure: Callable[[], Any],
        p: Vector,
        before: Generators,
        start: float,
        slope: float,
    ) -> float | None:
        """Return α, or None; weights, gradients, buffers and generators are as before."""
        options, w = self.param_groups[0], space.copy()
        after, buffers = Generators(x.device for x in space.weights), Buffers(self._model)

        def loss_at(t: float) -> float:
            space.step_along(space.weights, w, p, t)
            before.restore()
            reshard(self._model)
            with no_gradients(space.parameters):
                found = mean_loss(closure(), self._process_group)
            buffers.restore()
            return float(found)

        try:
            return line_search(loss_at, start, slope, options["trial"], options["bound"])
        finally:
            put_back(space, w)
            reshard(self._model)
            buffers.restore()
            after.restore()

    def __getstate__(self) -> dict[str, Any]:
        held = {"_model": self._model, "_process_group": self._process_group}
        return {**super().__getstate__(), **held}


def check_shared(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError where the groups' common numbers differ."""
    for name in SHARED:
        found = [group[name] for group in groups]
        if any(value != found[0] for value in found):
            raise ValueError(f"{name} must be the same in all param groups, got {found}")


def drawn(seed: int, count: int) -> float:
    """Return the number in [0, 1) of this place in a stream, which has no other state."""
    return numpy.random.Generator(numpy.random.Philox(key=seed, counter=count)).random()


def polak_ribiere(gg: float, gl: float, ll: float) -> float | None:
    """Return clamp((gg − gl)/ll, 0, 0.8), or None where there is no such number."""
    beta = (gg - gl) / ll if ll > 0 else math.nan
    return min(MOST, max(0.0, beta)) if math.isfinite(beta) else None


def line_search(
    loss_at: Callable[[float], float], start: float, slope: float, trial: float, bound: float
) -> float | None:
    """Return a t in (0, bound] at which the loss is below ``start``, or None.

    Args:
        loss_at: the loss at t.
        start: the loss at 0.
        slope: its derivative there.
        trial: the first t to look at.
        bound: the largest t.
    """
    points, rises = [trial], [loss_at(trial) - start]
    for _ in range(2):
        t = minimizer(points, rises, slope, bound)
        if t is None:
            return None
        rise = loss_at(t) - start
        if rise < 0:
            return t
        points.append(t)
        rises.append(rise)
    return None


def minimizer(points: list[float], rises: list[float], slope: float, bound: float) -> float | None:
    """Return the least-squares parabola's min(−b/2a, bound), or None unless a > 0 and b < 0.

    Args:
        points: t of each loss beside that at 0.
        rises: the losses less that at 0.
        slope: the derivative at 0, one equation more.
    """
    if not (all(map(math.isfinite, rises)) and -math.inf < slope < 0):
        return None
    # In units of the first point all columns are of one size.
    unit = points[0]
    rows = [[0.0, 0.0, 1.0], *([(t / unit) ** 2, t / unit, 1.0] for t in points), [0.0, 1.0, 0.0]]
    a, b, _ = numpy.linalg.lstsq(rows, [0.0, *rises, slope * unit], rcond=None)[0].tolist()
    if not (a > 0 and b < 0 and math.isfinite(b / a)):
        return None
    return min(-b / (2 * a) * unit, bound)
