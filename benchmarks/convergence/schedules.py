"""The shapes of learning rates, from their peak of 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

if TYPE_CHECKING:
    from .tasks import Task

WARM_UP = 0.05


def schedule(optimizer: Any, task: Task, steps: int) -> Any:
    """Return the task's schedule for a run of so many steps."""
    if task.schedule == "drops":
        return MultiStepLR(optimizer, [round(at * steps) for at in (0.6, 0.8, 0.95)], gamma=0.1)
    warm_up = max(1, round(WARM_UP * steps))
    return SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=0.01, total_iters=warm_up),
            CosineAnnealingLR(optimizer, T_max=steps - warm_up),
        ],
        milestones=[warm_up],
    )
