"""VectorOptimizer: the base of the optimizers that are made of vector ops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends.layout import compute_dtype
from ..checkpoint_checks import check_entries
from ..options import number
from ..state import conform, load_keeping_dtypes
from ..torch_internals import local
from ..vectors.space import Space, Vector

SPACES_PER_GROUP = 4
"""Sets of weights with gradients whose tables are kept, for each param group."""


class GroupGradients(NamedTuple):
    """The weights of one param group that have gradients."""

    group_index: int
    group: dict[str, Any]
    space: Space
    gradients: Vector


STATE_VECTORS = ("exp_avg", "momentum_buffer", "last_gradient")
"""The entries of the state that ops read, each laid out as its weight."""


class VectorOptimizer(Optimizer):
    """A torch optimizer whose arithmetic is vector ops; weights without gradients are skipped.

    Subclasses implement :meth:`check_options` and ``step``.

    Args:
        params: weights or param groups.
        defaults: options of the groups.
        backend: "auto" or the name of a backend.
        reduce_group: the process group over which plain weights are sharded, or None.

    Raises:
        ValueError: for options out of range, or a backend that does not serve the weights' device.
    """

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], backend: str, reduce_group: Any
    ) -> None:
        self._options = (backend, reduce_group)
        self._drop_derived()
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["params"]:
                # Raises now, not in the first step, for an unsuitable backend.
                self._space(group["params"])

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError for a group's options that are out of range."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights with options of their own.

        Raises:
            ValueError: for options out of range; nothing has changed then.
        """
        self.check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the dtype in which the state was saved.

        Raises:
            ValueError: for state that cannot be its weight's; nothing has changed then.
        """
        load_keeping_dtypes(self, super().load_state_dict, state_dict, self._check_loaded)

    def _check_loaded(self, loaded: dict[str, Any]) -> None:
        check_entries(loaded, self.param_groups, (*STATE_VECTORS, "step"))

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep."""
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, or take the groups and state of a checkpoint."""
        super().__setstate__(state)
        self._drop_derived()

    def _drop_derived(self) -> None:
        """Drop everything that can be derived from param_groups and state."""
        self._spaces: dict[tuple[int, ...], Space] = {}

    def _space(self, weights: Sequence[Tensor]) -> Space:
        """Return the space of these weights, rebuilt if they have moved."""
        key = tuple(map(id, weights))
        space = self._spaces.get(key)
        if space is None or not space.fits():
            self._spaces.pop(key, None)
            if len(self._spaces) >= SPACES_PER_GROUP * len(self.param_groups):
                del self._spaces[next(iter(self._spaces))]
            space = self._spaces[key] = Space(weights, *self._options)
        return space

    def _state_vector(self, space: Space, name: str, weight_dtype: bool = False) -> Vector:
        """Return an entry of the weights' state as a vector, created with zeros if absent.

        Args:
            space: the weights.
            name: the entry.
            weight_dtype: whether it has the weights' dtype instead of that of the arithmetic.
        """
        vector = []
        for p in space.parameters:
            state = self.state[p]
            dtype = p.dtype if weight_dtype else compute_dtype(p.dtype)
            state[name] = conform(state.get(name), p, dtype)
            vector.append(local(state[name]))
        return vector

    def _collect_gradients(self) -> list[GroupGradients]:
        """Return the groups in which a weight has a gradient; raise before anything changes."""
        found = []
        for i, group in enumerate(self.param_groups):
            weights = [p for p in group["params"] if p.grad is not None]
            space = self._space(weights) if weights else None
            gradients = space.gradients() if space else None
            if space is not None and gradients is not None:
                found.append(GroupGradients(i, group, space, gradients))
        return found


def check_lr(lr: float | Tensor, *, above: bool = False) -> None:
    """Raise ValueError unless an lr, a number or a 0-dim tensor, is finite and 0 or more.

    Args:
        lr: the lr.
        above: exclude 0.
    """
    number("lr", float(lr) if torch.is_tensor(lr) else lr, 0, above=above)
