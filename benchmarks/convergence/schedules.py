"""Shapes of learning rates, relative to a peak of 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    SequentialLR,
)

if TYPE_CHECKING:
    from .tasks import Task

WARM_UP = 0.05
DROPS = (0.6, 0.8, 0.95)
FALLS = {"linear": 1 - WARM_UP, "wsd": 0.2}
"""Other shapes than the cosine: the part of the steps, at the end, over which the lr falls to 0."""


def drops(optimizer: Any, steps: int) -> Any:
    """Multiply the lr by 0.1 at 60, 80 and 95 % of the steps."""
    return MultiStepLR(optimizer, [round(at * steps) for at in DROPS], gamma=0.1)


def schedule(optimizer: Any, task: Task, steps: int, shape: str = "") -> Any:
    """Return the task's schedule for a run of ``steps`` steps.

    Args:
        shape: a name in FALLS, in place of the cosine after the warm-up.
    """
    if task.schedule == "drops":
        return drops(optimizer, steps)
    warm_up = max(1, round(WARM_UP * steps))
    rest = steps - warm_up
    warming = LinearLR(optimizer, start_factor=0.01, total_iters=warm_up)
    if shape:
        fall = FALLS[shape] * steps
        falling: Any = LambdaLR(optimizer, lambda t: min(1.0, (rest - t) / fall))
    else:
        falling = CosineAnnealingLR(optimizer, T_max=rest)
    return SequentialLR(optimizer, [warming, falling], milestones=[warm_up])
