"""ProbeScheduler: the base of the tuners that choose the lr by probing the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..options import integer
from .probe import LineProbe
from .trial import Closure


class ProbeScheduler:
    """Multiply the lr of all groups by a factor that is found by probing the loss along the step.

    Args:
        optimizer: any torch optimizer whose ``step()`` needs no closure.
        model: the model whose buffers are restored after a probe, if it has any.
        every: steps from one probe to the next; the first step probes.
        min_lr, max_lr: the range of each group's lr.
        probe_options: ``backend``, ``reduce_group`` and ``process_group`` of :class:`LineProbe`.

    Raises:
        ValueError: for options out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None,
        every: int,
        min_lr: float,
        max_lr: float,
        **probe_options: Any,
    ) -> None:
        self.every = integer("every", every, 1)
        if not 0 <= min_lr <= max_lr:
            raise ValueError(f"expected 0 <= min_lr <= max_lr, got {min_lr} and {max_lr}")
        self.optimizer = optimizer
        self.probe = LineProbe(optimizer, model, **probe_options)
        self.min_lr, self.max_lr = float(min_lr), float(max_lr)
        self.count = 0
        """Calls of :meth:`step` so far."""
        self.losses: list[float] = []
        """The losses of the last probe, in the order of its multiples."""

    @property
    def due(self) -> bool:
        """Whether the next :meth:`step` probes, and so calls its closure."""
        return self.count % self.every == 0

    def step(self, closure: Closure) -> bool:
        """Probe if it is due, and change the lr.

        Call it in every step, after the backward pass and before the optimizer's step.

        Args:
            closure: as for :class:`LineProbe`; called only if a probe is :attr:`due`.

        Returns:
            Whether the lr was changed.

        Raises:
            ValueError: if no weight has a gradient; nothing has changed then.
        """
        factor = self._lr_factor(closure) if self.due else None
        self.count += 1
        if factor is None:
            return False
        # All are read first: groups that were created without their own lr share one tensor.
        lrs = [factor * lr for lr in self.get_last_lr()]
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            set_lr(group, min(self.max_lr, max(self.min_lr, lr)))
        return True

    def _lr_factor(self, closure: Closure) -> float | None:
        """Return the factor of the lr, or None to keep the lr."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """Return the present lr of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs besides the optimizer's state dict, which has the lrs."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`; the optimizer's must be loaded as well.

        Raises:
            ValueError: for other entries, or a count that is not an integer of 0 or more.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"expected the entries {sorted(self.state_dict())}, got {sorted(state)}"
            )
        self.count = integer("count", state["count"], 0)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set a group's lr; an lr that is a tensor stays the same tensor."""
    if torch.is_tensor(group["lr"]):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
