"""VectorOptimizer: what the optimizers here that are made of vector verbs have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from ..backends.layout import compute_dtype
from ..state import conform, load_keeping_dtypes
from ..torch_internals import local
from ..vectors.space import Space, Vector

# Sets of weights whose tables are kept, for each group: now this weight has a gradient, now that.
KEPT = 4


class Ready(NamedTuple):
    """The weights of one param group that have gradients."""

    number: int
    group: dict[str, Any]
    space: Space
    gradients: Vector


class VectorOptimizer(Optimizer):
    """A torch optimizer whose arithmetic is vector verbs; weights without gradients sit out.

    Args:
        params: weights or param groups.
        defaults: options of the groups.
        backend: "auto" or a backend's name.
        reduce_group: the process group over which plain weights are sharded, or None.

    Raises:
        ValueError: for options out of range, or a backend that does not serve the weights' device.
    """

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], backend: str, reduce_group: Any
    ) -> None:
        self._options = (backend, reduce_group)
        self._forget()
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["params"]:
                # An unfit backend is to be named now.
                self._space(group["params"])

    def check(self, options: dict[str, Any]) -> None:
        """Raise ValueError for options of a group that are out of range."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights with options of their own, as torch's optimizers do."""
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does; state keeps the dtype that it was saved in."""
        load_keeping_dtypes(self, super().load_state_dict, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Drop what is made anew from param_groups and state."""
        self._spaces: dict[tuple[int, ...], Space] = {}

    def _space(self, weights: Sequence[Tensor]) -> Space:
        """Return the space over these weights, made anew where they have moved."""
        key = tuple(map(id, weights))
        space = self._spaces.get(key)
        if space is None or not space.fits():
            self._spaces.pop(key, None)
            if len(self._spaces) >= KEPT * len(self.param_groups):
                del self._spaces[next(iter(self._spaces))]
            space = self._spaces[key] = Space(weights, *self._options)
        return space

    def _vector(self, space: Space, name: str, narrow: bool = False) -> Vector:
        """Return the weights' state of this name, zeros where there was none.

        Args:
            narrow: in the weights' own dtype, not in that of the arithmetic.
        """
        found = []
        for p in space.parameters:
            state, dtype = self.state[p], p.dtype if narrow else compute_dtype(p.dtype)
            state[name] = conform(state.get(name), p, dtype)
            found.append(local(state[name]))
        return found

    def _ready(self) -> list[Ready]:
        """Return the groups in which any weight has a gradient; all are looked at beforehand."""
        ready = []
        for number, group in enumerate(self.param_groups):
            weights = [p for p in group["params"] if p.grad is not None]
            space = self._space(weights) if weights else None
            gradients = space.gradients() if space else None
            if space is not None and gradients is not None:
                ready.append(Ready(number, group, space, gradients))
        return ready
