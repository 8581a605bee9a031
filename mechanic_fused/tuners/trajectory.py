"""The path of the weights that AutoDrop measures, and the base of its rules for dropping the lr."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from operator import is_
from typing import Any, ClassVar

from torch import Tensor

from ..distributed import like, wrap
from ..torch_internals import local
from ..vectors.space import Space, Vector

VECTORS = ("sum", "previous", "displacement")
"""The vectors of a trajectory, by their names in state dicts."""


class Trajectory:
    """Positions of all weights and the angle between their last two displacements.

    Args:
        weights: the weights.
        sums: whether positions are sums of weights, in the dtype of the arithmetic, or weights.
        backend, reduce_group: as for :class:`mechanic_fused.vectors.Space`.
    """

    def __init__(
        self, weights: Sequence[Tensor], sums: bool, backend: str, reduce_group: Any
    ) -> None:
        self.space = self.position_space = Space(weights, backend, reduce_group)
        self.sum = self.space.zeros()
        self.previous = self.space.zeros() if sums else self.space.copy()
        # Zeros, because 0·garbage could be NaN.
        self.displacement = self.space.zeros()
        if sums:
            # A space of the sums: each has its own dtype and is sharded as its weight is.
            wrapped = [wrap(s, p) for s, p in zip(self.sum, weights, strict=True)]
            self.position_space = Space(wrapped, backend, reduce_group)
        self.squared_norm = 0.0
        """‖displacement‖²."""
        self.has_position = False

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Return whether these are the same weights, in the same memory."""
        known = self.space.parameters
        return len(weights) == len(known) and all(map(is_, weights, known)) and self.space.fits()

    def advance(self, position: Vector) -> float | None:
        """Move to a position; return the angle between the last two displacements in degrees.

        None if there are not two of them, or one is exactly 0 or not finite. The caller sets
        ``previous``.
        """
        if not self.has_position:
            self.has_position = True
            return None
        dot, squared = self.position_space.difference_dots(
            self.displacement, position, self.previous
        ).tolist()
        before, self.squared_norm = self.squared_norm, squared
        if not (0 < before < math.inf and 0 < squared < math.inf and math.isfinite(dot)):
            return None
        # Two roots, because the product of two squares may overflow.
        cosine = dot / math.sqrt(before) / math.sqrt(squared)
        return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))

    def write_mean(self, total: int) -> None:
        """Write sum/total to the weights; autograd sees the write."""
        for x, a in zip(self.space.weights, self.sum, strict=True):
            x.copy_(a.div_(total))

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors, the live tensors sharded as the weights are, and two numbers."""
        weights = self.space.parameters
        vectors: dict[str, Any] = {
            name: [wrap(t, p) for t, p in zip(getattr(self, name), weights, strict=True)]
            for name in VECTORS
        }
        return {**vectors, "squared": self.squared_norm, "placed": self.has_position}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`.

        Raises:
            ValueError: for vectors of other shapes; nothing has changed then.
        """
        weights = self.space.parameters
        for name in VECTORS:
            got, expected = ([tuple(t.shape) for t in v] for v in (saved[name], weights))
            if got != expected:
                raise ValueError(
                    f"{name} must have the shapes of the weights, expected {expected}, got {got}"
                )
        for name in VECTORS:
            for mine, t, p in zip(getattr(self, name), saved[name], weights, strict=True):
                mine.copy_(local(like(t, p)))
        self.squared_norm, self.has_position = float(saved["squared"]), bool(saved["placed"])


class DropRule:
    """When to drop the lr, decided from angles: the base of AutoDrop's two versions.

    Args:
        options: AutoDrop's options.
    """

    DEFAULTS: ClassVar[dict[str, Any]]
    """The options of this version that have a default."""
    SUMS: ClassVar[bool]
    """Whether positions are sums of weights."""
    ENTRIES: ClassVar[dict[str, str]]
    """Entry of a state dict → attribute."""
    UNUSED: ClassVar[dict[str, Any]]
    """Entries of a state dict that only the other version uses."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.k: int = options["k"]
        self.threshold: float = options["threshold"]
        self.angle: float | None = None

    def observe(self, trajectory: Trajectory, step: int) -> bool:
        """Read the weights after a step of the optimizer; return whether the lr must drop.

        Args:
            trajectory: their trajectory.
            step: the number of the step, from 1.
        """
        raise NotImplementedError

    def restart(self) -> None:
        """Drop what was measured of weights that have changed since."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all numbers."""
        own = {entry: getattr(self, name) for entry, name in self.ENTRIES.items()}
        return copy.deepcopy({**self.UNUSED, **own})

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`, which may have other entries as well."""
        for entry, name in self.ENTRIES.items():
            setattr(self, name, copy.deepcopy(saved[entry]))
