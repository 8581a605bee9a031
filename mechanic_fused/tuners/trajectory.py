"""What AutoDrop measures: how the path of the weights turns, and the curve through its angles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor

from ..distributed import like, wrap
from ..torch_internals import local
from ..vectors.space import Space, Vector

VECTORS = ("sum", "previous", "displacement")


class Trajectory:
    """Positions of all weights and how they move: the angle between two displacements.

    Args:
        weights: the weights.
        sums: whether positions are sums in the dtype of the arithmetic, or the weights themselves.
        backend, reduce_group: as of :class:`mechanic_fused.vectors.space.Space`.
    """

    def __init__(
        self, weights: Sequence[Tensor], sums: bool, backend: str, reduce_group: Any
    ) -> None:
        self.space = self.positions = Space(weights, backend, reduce_group)
        self.sum = self.space.zeros()
        self.previous = self.space.zeros() if sums else self.space.copy()
        # Zeros, for 0·garbage could be NaN.
        self.displacement = self.space.zeros()
        if sums:
            # A Space of the sums themselves: each has its own dtype, sharded as its weight is.
            wrapped = [wrap(s, p) for s, p in zip(self.sum, weights, strict=True)]
            self.positions = Space(wrapped, backend, reduce_group)
        self.squared = 0.0
        self.placed = False

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Return whether these are the weights, where they were."""
        known = self.space.parameters
        return len(weights) == len(known) and all(map(is_, weights, known)) and self.space.fits()

    def turned(self, position: Vector) -> float | None:
        """Move on to a position; return the angle between the last two displacements, degrees.

        None where there are not two, or one of them is exactly 0 or not finite. ``previous`` is
        left to the caller.
        """
        if not self.placed:
            self.placed = True
            return None
        dot, squared = self.positions.difference_dots(
            self.displacement, position, self.previous
        ).tolist()
        before, self.squared = self.squared, squared
        if not (0 < before < math.inf and 0 < squared < math.inf and math.isfinite(dot)):
            return None
        # Two roots: the product of two squares may leave the range.
        cosine = dot / math.sqrt(before) / math.sqrt(squared)
        return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))

    def replace(self, total: int) -> None:
        """Write sum/total to the weights, which counts as a write for autograd."""
        for x, a in zip(self.space.weights, self.sum, strict=True):
            x.copy_(a.div_(total))

    def saved(self) -> dict[str, Any]:
        vectors: dict[str, Any] = {
            name: [
                wrap(t, p) for t, p in zip(getattr(self, name), self.space.parameters, strict=True)
            ]
            for name in VECTORS
        }
        return {**vectors, "squared": self.squared, "placed": self.placed}

    def load(self, saved: dict[str, Any]) -> None:
        """Take over ``saved()``, or raise ValueError before anything has changed."""
        weights = self.space.parameters
        for name in VECTORS:
            got, expected = ([tuple(t.shape) for t in v] for v in (saved[name], weights))
            if got != expected:
                raise ValueError(
                    f"{name} must be of the weights' shapes, expected {expected}, got {got}"
                )
        for name in VECTORS:
            for mine, t, p in zip(getattr(self, name), saved[name], weights, strict=True):
                mine.copy_(local(like(t, p)))
        self.squared, self.placed = float(saved["squared"]), bool(saved["placed"])


def smooth(angles: Sequence[float]) -> float:
    """Return the smoothed value at the newest angle: C = Σwᵢωᵢ/Σwᵢ, wᵢ = exp(−(m − i)²/2σ²) for
    i = 1 … m and σ = min(std, m/2); the newest angle itself for σ = 0."""
    width = min(statistics.pstdev(angles), len(angles) / 2)
    if width == 0:
        return angles[-1]
    # Products, for ** raises an error where they overflow.
    far = [age / width for age in range(len(angles) - 1, -1, -1)]
    weights = [math.exp(-0.5 * d * d) for d in far]
    return math.fsum(w * a for w, a in zip(weights, angles, strict=True)) / math.fsum(weights)
