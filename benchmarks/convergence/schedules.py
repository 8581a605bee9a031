"""Shapes of learning rates, relative to a peak of 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

if TYPE_CHECKING:
    from .tasks import Task

WARM_UP = 0.05
DROPS = (0.6, 0.8, 0.95)


def drops(optimizer: Any, steps: int) -> Any:
    """Multiply the lr by 0.1 at 60, 80 and 95 % of the steps."""
    return MultiStepLR(optimizer, [round(at * steps) for at in DROPS], gamma=0.1)


def schedule(optimizer: Any, task: Task, steps: int) -> Any:
    """Return the task's schedule for a run of ``steps`` steps."""
    if task.schedule == "drops":
        return drops(optimizer, steps)
    warm_up = max(1, round(WARM_UP * steps))
    return SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=0.01, total_iters=warm_up),
            CosineAnnealingLR(optimizer, T_max=steps - warm_up),
        ],
        milestones=[warm_up],
    )
