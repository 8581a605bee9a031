"""AutoDrop, version 1: angles of epochs, and an average of the weights at each drop."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from .trajectory import DropRule, Trajectory


class EpochRule(DropRule):
    """Drop the lr some epochs after the angle between epochs has settled, and average the weights.

    x_e are the weights after the first step of epoch e of k steps, s_e = x_e − x_{e−1} and ω_e the
    angle between s_e and s_{e−1}. Once |ω_e − ω_{e−1}| < θ, A += n·x_e for n = 1 … ``extra``
    epochs; then the lr drops, θ = min(``threshold_max``, θ/``factor``) and the weights become
    A/(extra·(extra + 1)/2).

    Ours: x_e is the position before the average replaces it. An average is abandoned if the weights
    are not finite.

    Source: arXiv 2111.15317, from the authors' code.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "factor": 0.2,
        "threshold": 0.01,
        "min_lr": 1e-4,
        "extra": 20,
        "threshold_max": 1.0,
    }
    SUMS = False
    ENTRIES: ClassVar[dict[str, str]] = {
        "threshold": "threshold",
        "angle": "angle",
        "before": "previous_angle",
        "armed": "averaging",
        "count": "averaged_epochs",
    }
    UNUSED: ClassVar[dict[str, Any]] = {"level": None, "angles": [], "smoothed": []}

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.factor: float = options["factor"]
        self.extra: int = options["extra"]
        self.threshold_max: float = options["threshold_max"]
        self.restart()

    def restart(self) -> None:
        """Drop what was measured of weights that have changed since."""
        self.angle = None
        self.previous_angle: float | None = None
        """The angle of the epoch before, if it had one."""
        self.averaging, self.averaged_epochs = False, 0

    def observe(self, trajectory: Trajectory, step: int) -> bool:
        """Read the weights after a step; return whether the lr must drop.

        With a drop the weights are replaced by their average.
        """
        if (step - 1) % self.k:
            return False
        weights = trajectory.space.weights
        angle, previous = trajectory.advance(weights), self.previous_angle
        self.previous_angle = angle
        for old, x in zip(trajectory.previous, weights, strict=True):
            old.copy_(x)
        if not math.isfinite(trajectory.squared_norm):
            # The average could never be finite again.
            self.averaging, self.averaged_epochs = False, 0
            return False
        if angle is not None:
            self.angle = angle
            self.averaging |= previous is not None and abs(angle - previous) < self.threshold
        if not self.averaging:
            return False
        self.averaged_epochs += 1
        n = self.averaged_epochs
        # The first epoch overwrites the sum, so that it need not be zeroed.
        trajectory.space.axpby(trajectory.sum, weights, 1.0 if n > 1 else 0.0, float(n))
        if n < self.extra:
            return False
        self.threshold = min(self.threshold_max, self.threshold / self.factor)
        self.averaging, self.averaged_epochs = False, 0
        trajectory.write_mean(self.extra * (self.extra + 1) // 2)
        return True
