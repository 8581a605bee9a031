"""CGQ: momentum SGD that learns its lr and momentum from occasional line searches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import nn

from ..options import integer, number
from ..vectors.space import Space, Vector
from .probe_scheduler import set_lr
from .snapshot import GeneratorStates
from .trial import mean_loss, trial_losses
from .vector_optimizer import VectorOptimizer, check_lr

SHARED = ("lr", "momentum", "probability", "trial", "bound", "seed", "draws")
"""The options that all groups have in common: a search is along one line through all weights."""

MAX_BETA = 0.8
"""The largest β of a search, from the authors' code."""


class CGQ(VectorOptimizer):
    """Step as momentum SGD, and learn its lr and momentum from occasional line searches.

    p = μ·p + g + weight_decay·x;   x −= lr·p. With ``probability`` a step is a search instead:

    β = clamp(⟨g, g − g_last⟩/‖g_last‖², 0, 0.8), where g_last is the gradient of the last search;

    μ ← (μ + β)/2;   p = β·p + g + weight_decay·x;   x −= α·p;   lr ← (lr + α)/2,

    α = min(−b/2a, bound) for the least-squares parabola a·t² + b·t + c through the losses at
    x − t·p for t = 0 and t = ``trial`` and the slope −⟨g, p⟩ at 0. If the loss at α is not below
    that at 0, the parabola is fitted once more with it. If a ≤ 0, b ≥ 0, a number is not finite, or
    no α lowers the loss, the step is made with lr, and lr is kept.

    Args:
        params: weights or param groups; only ``weight_decay`` may differ between groups.
        lr: initial step size, 0 or more; param_groups have the learned one.
        momentum: initial μ, in [0, 1); param_groups have the learned one.
        weight_decay: 0 or more; not part of the losses of a search.
        probability: of a search in each step, in [0, 1].
        trial: the first t, above 0.
        bound: the largest α, above 0.
        seed: of the draws that decide when to search; the same on all ranks.
        model: the model whose buffers are restored after a search, if it has any.
        backend: "auto" or the name of a backend.
        reduce_group: the process group over which plain weights are sharded, or None.
        process_group: the ranks over which losses are averaged; None for all.

    Raises:
        ValueError: for options out of range, shared options that differ between groups, or a
            backend that does not serve the weights' device.

    The state is p in float32 (float64 for float64 weights) and, after the first search, g_last in
    the weights' dtype; during a search also copies of these and of the weights. A step calls the
    closure once with gradients, and a search one to three times more without.

    Source: arXiv 2106.11548 and its authors' code, which gives the defaults of ``probability``,
    ``trial`` and ``bound``. Ours: one search over all groups; keeping lr if the parabola has no
    minimum; at most three more losses; the same random numbers in each; no weight decay in them.

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

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError for a group's options that are out of range."""
        check_lr(options["lr"])
        number("momentum", options["momentum"], 0, 1, below=True)
        number("weight_decay", options["weight_decay"], 0)
        number("probability", options["probability"], 0, 1)
        number("trial", options["trial"], 0, above=True)
        number("bound", options["bound"], 0, above=True)
        integer("seed", options["seed"], 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights, with what the other groups have learned.

        Raises:
            ValueError: for options out of range, or a shared option that differs from the first
                group's.
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
            closure: clears gradients, returns the loss and, if ``loss.requires_grad``, does the
                backward pass, as for torch's LBFGS. A search calls it again without gradients and
                with the random numbers of the first call; all calls must see the same batch.

        Returns:
            The loss before the step.

        Raises:
            ValueError: without a closure, for a closure that leaves no gradients or unusable ones,
                or for shared options that differ between groups; nothing has changed then.
        """
        if closure is None:
            raise ValueError("CGQ needs a closure that returns the loss, got None")
        check_shared(self.param_groups)
        options = self.param_groups[0]
        searches = uniform(options["seed"], options["draws"]) < options["probability"]
        devices = {p.device for group in self.param_groups for p in group["params"]}
        generators = GeneratorStates(devices) if searches else None
        with torch.enable_grad():
            loss = closure()
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        space = self._space(weights) if weights else None
        g = space.gradients() if space else None
        if space is None or g is None:
            raise ValueError("the closure must do the backward pass, got no gradients")
        lr, momentum = float(options["lr"]), options["momentum"]
        p = self._state_vector(space, "momentum_buffer")
        if generators is None:
            self._update_direction(space, g, p, momentum)
            space.step_along(space.weights, space.weights, p, lr)
        else:
            start = float(mean_loss(loss, self._process_group))
            last = self._state_vector(space, "last_gradient", weight_dtype=True)
            held = [t.clone() for t in (*p, *last)]
            try:
                beta, slope = self._conjugate_direction(space, g, p, last)
                alpha = self._search(space, closure, p, generators, start, slope)
            except BaseException:
                torch._foreach_copy_([*p, *last], held)
                raise
            space.step_along(space.weights, space.weights, p, lr if alpha is None else alpha)
            lr = lr if alpha is None else (lr + alpha) / 2
            momentum = momentum if beta is None else (momentum + beta) / 2
        learned = {"momentum": momentum, "draws": options["draws"] + 1}
        for group in self.param_groups:
            set_lr(group, lr)
            group.update(learned)
        return loss

    def _update_direction(self, space: Space, g: Vector, p: Vector, beta: float) -> None:
        """p = β·p + g + weight_decay·x."""
        space.axpby(p, g, beta, 1.0)
        index = {id(weight): i for i, weight in enumerate(space.parameters)}
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if id(weight) in index]
            if group["weight_decay"] and weights:
                own = self._space(weights)
                own_p = [p[index[id(weight)]] for weight in weights]
                own.axpby(own_p, own.weights, 1.0, group["weight_decay"])

    def _conjugate_direction(
        self, space: Space, g: Vector, p: Vector, last: Vector
    ) -> tuple[float | None, float]:
        """Update p with the β of Polak and Ribière; return β, if there is one, and the slope."""
        gg, gl, ll, gp = space.dots(g, last, p).tolist()
        torch._foreach_copy_(last, g)
        found = polak_ribiere(gg, gl, ll)
        beta = self.param_groups[0]["momentum"] if found is None else found
        self._update_direction(space, g, p, beta)
        if any(group["weight_decay"] for group in self.param_groups):
            # The sums above do not include ⟨g, x⟩.
            return found, -float(space.dots(g, last, p)[3])
        return found, -(beta * gp + gg)

    def _search(
        self,
        space: Space,
        closure: Callable[[], Any],
        p: Vector,
        generators: GeneratorStates,
        start: float,
        slope: float,
    ) -> float | None:
        """Return α or None; weights, gradients, buffers and generators are restored."""
        options = self.param_groups[0]
        with trial_losses(
            closure,
            space,
            space.copy(),
            p,
            model=self._model,
            process_group=self._process_group,
            generators=generators,
        ) as loss_at:
            return line_search(
                lambda t: float(loss_at(t)), start, slope, options["trial"], options["bound"]
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep."""
        held = {"_model": self._model, "_process_group": self._process_group}
        return {**super().__getstate__(), **held}


def check_shared(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError for a shared option that differs between groups."""
    for name in SHARED:
        found = [group[name] for group in groups]
        if any(value != found[0] for value in found):
            raise ValueError(f"{name} must be the same in all param groups, got {found}")


def uniform(seed: int, index: int) -> float:
    """Return element ``index`` of a stream of numbers in [0, 1), without any other state."""
    return numpy.random.Generator(numpy.random.Philox(key=seed, counter=index)).random()


def polak_ribiere(gg: float, gl: float, ll: float) -> float | None:
    """Return clamp((gg − gl)/ll, 0, 0.8), or None if that is not a number."""
    beta = (gg - gl) / ll if ll > 0 else math.nan
    return min(MAX_BETA, max(0.0, beta)) if math.isfinite(beta) else None


def line_search(
    loss_at: Callable[[float], float], start: float, slope: float, trial: float, bound: float
) -> float | None:
    """Return a t in (0, bound] at which the loss is below ``start``, or None.

    Args:
        loss_at: returns the loss at t.
        start: the loss at 0.
        slope: its derivative at 0.
        trial: the first t.
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
    """Return min(−b/2a, bound) of the least-squares parabola, or None unless a > 0 and b < 0.

    Args:
        points: t of each loss besides that at 0.
        rises: these losses minus the loss at 0.
        slope: the derivative at 0, which is one more equation.
        bound: the largest t.
    """
    if not (all(map(math.isfinite, rises)) and -math.inf < slope < 0):
        return None
    # In units of the first point all columns have the same magnitude.
    unit = points[0]
    rows = [[0.0, 0.0, 1.0], *([(t / unit) ** 2, t / unit, 1.0] for t in points), [0.0, 1.0, 0.0]]
    a, b, _ = numpy.linalg.lstsq(rows, [0.0, *rises, slope * unit], rcond=None)[0].tolist()
    if not (a > 0 and b < 0 and math.isfinite(b / a)):
        return None
    return min(-b / (2 * a) * unit, bound)
