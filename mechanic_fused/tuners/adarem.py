"""AdaRem: SGD whose steps grow along the momentum and shrink against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..vectors.reference import AdaRemOptions
from ..vectors.space import Space, Vector
from .vector_optimizer import Ready, VectorOptimizer


class AdaRem(VectorOptimizer):
    """Enlarge steps that go along with the momentum and shorten those that go against it.

    b = sign(g)·m/(max|m| + ε);   x −= lr·((1 + λᵗ·b)·g + weight_decay·x);   m = β·m + (1−β)·g,

    max|m| being each weight tensor's own, and t the number of the optimizer's step, from 1.

    Args:
        params: weights or param groups; all options may differ between groups.
        lr: step size, 0 or more.
        beta: β, in [0, 1).
        lam: λ, in [0, 1]: how slowly it turns into plain SGD.
        weight_decay: 0 or more.
        eps: ε, above 0.
        backend: "auto" or a backend's name.
        reduce_group: the process group over which plain weights are sharded, or None.

    Raises:
        ValueError: for options out of range, or a backend that does not serve the weights' device.

    Elements of a gradient that are not finite count as 0. Beside the weights it keeps m in float32
    (float64 for float64 weights); a step reads g, m and x once and writes m and x.

    Source: arXiv 2010.11041, at second hand: the formula is that of a port, and so are the
    defaults.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import AdaRem
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = AdaRem([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 3) for x in weight.tolist()]
        [0.8, 0.8, 0.8]
    """

    _count: int | None
    _peaks: dict[int, tuple[Space, Vector, Tensor]]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.4,
        beta: float = 0.9,
        lam: float = 0.999,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        backend: str = "auto",
        reduce_group: Any = None,
    ) -> None:
        options = {"lr": lr, "beta": beta, "lam": lam, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, options, backend, reduce_group)

    def check(self, options: dict[str, Any]) -> None:
        """Raise ValueError for options of a group that are out of range."""
        for name in ("lr", "weight_decay"):
            if not 0 <= options[name] < math.inf:
                raise ValueError(f"{name} must be finite and 0 or more, got {options[name]}")
        if not 0 <= options["beta"] < 1:
            raise ValueError(f"beta must lie in [0, 1), got {options['beta']}")
        if not 0 <= options["lam"] <= 1:
            raise ValueError(f"lam must lie in [0, 1], got {options['lam']}")
        if not 0 < options["eps"] < math.inf:
            raise ValueError(f"eps must be finite and above 0, got {options['eps']}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the weights that have gradients.

        Args:
            closure: evaluates the model again and returns the loss, which ``step`` returns.

        Raises:
            ValueError: for sparse or complex gradients; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = self._ready()
        if ready:
            self._count = self._steps() + 1
        for item in ready:
            self._move(item)
        return loss

    def _move(self, item: Ready) -> None:
        number, group, space, g = item
        m = self._vector(space, "exp_avg")
        options = AdaRemOptions(
            float(group["lr"]),
            group["beta"],
            group["lam"] ** self._steps(),
            group["weight_decay"],
            group["eps"],
        )
        peaks = space.adarem(g, m, self._known_peaks(number, space, m), options)
        self._peaks[number] = space, m, peaks
        for p in space.parameters:
            step = self.state[p].setdefault("step", torch.zeros((), dtype=torch.float32))
            step.fill_(self._steps())

    def _known_peaks(self, number: int, space: Space, m: Vector) -> Tensor:
        """Return max|m| of each weight: the last step's, or counted anew from another m."""
        known = self._peaks.get(number)
        if known is not None and known[0] is space:
            if all(a is b for a, b in zip(known[1], m, strict=True)):
                return known[2]
        return space.abs_max(m)

    def _steps(self) -> int:
        """Return how many steps the optimizer has taken; a weight may have sat some out."""
        if self._count is None:
            counts = [int(state["step"]) for state in self.state.values() if "step" in state]
            self._count = max(counts, default=0)
        return self._count

    def _forget(self) -> None:
        super()._forget()
        self._count, self._peaks = None, {}
