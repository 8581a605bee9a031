"""AdaRem: SGD with longer steps along the momentum and shorter steps against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..options import number
from ..vectors.reference import AdaRemOptions
from ..vectors.space import Space, Vector
from .vector_optimizer import GroupGradients, VectorOptimizer, check_lr


class AdaRem(VectorOptimizer):
    """Lengthen the elements of a step that agree in sign with the momentum, shorten the others.

    b = sign(g)·m/(max|m| + ε);   x −= lr·((1 + λᵗ·b)·g + weight_decay·x);   m = β·m + (1 − β)·g,

    where max|m| is taken over each weight tensor and t counts the optimizer's steps from 1.

    Args:
        params: weights or param groups; all options may differ between groups.
        lr: step size, 0 or more.
        beta: β, in [0, 1).
        lam: λ, in [0, 1]; as λᵗ decays, the method becomes plain SGD.
        weight_decay: 0 or more.
        eps: ε, above 0.
        backend: "auto" or the name of a backend.
        reduce_group: the process group over which plain weights are sharded, or None.

    Raises:
        ValueError: for options out of range, or a backend that does not serve the weights' device.

    Gradient elements that are not finite count as 0. The state is m in float32 (float64 for float64
    weights); a step reads g, m and x once and writes m and x.

    Source: arXiv 2010.11041 at second hand: formula and defaults are those of a port.

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

    _step_count: int | None
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

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError for a group's options that are out of range."""
        check_lr(options["lr"])
        number("weight_decay", options["weight_decay"], 0)
        number("beta", options["beta"], 0, 1, below=True)
        number("lam", options["lam"], 0, 1)
        number("eps", options["eps"], 0, above=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the weights that have gradients.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` returns.

        Raises:
            ValueError: for sparse or complex gradients; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = self._collect_gradients()
        if found:
            self._step_count = self._steps() + 1
        for item in found:
            self._step_group(item)
        return loss

    def _step_group(self, item: GroupGradients) -> None:
        group, space = item.group, item.space
        m = self._state_vector(space, "exp_avg")
        options = AdaRemOptions(
            lr=float(group["lr"]),
            beta=group["beta"],
            lam_t=group["lam"] ** self._steps(),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        peaks = space.adarem(
            item.gradients, m, self._last_peaks(item.group_index, space, m), options
        )
        self._peaks[item.group_index] = space, m, peaks
        for p in space.parameters:
            step = self.state[p].setdefault(
                "step", torch.zeros((), dtype=torch.float32, device="cpu")
            )
            step.fill_(self._steps())

    def _last_peaks(self, index: int, space: Space, m: Vector) -> Tensor:
        """Return max|m| of each weight: from the last step, or from m if m is another vector."""
        if index in self._peaks:
            last_space, last_m, peaks = self._peaks[index]
            if last_space is space and all(a is b for a, b in zip(last_m, m, strict=True)):
                return peaks
        return space.abs_max(m)

    def _steps(self) -> int:
        """Return the number of the optimizer's steps; a weight may have been skipped in some."""
        if self._step_count is None:
            counts = [int(state["step"]) for state in self.state.values() if "step" in state]
            self._step_count = max(counts, default=0)
        return self._step_count

    def _drop_derived(self) -> None:
        super()._drop_derived()
        self._step_count, self._peaks = None, {}
