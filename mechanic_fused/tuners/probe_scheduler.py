"""What the tuners that probe have in common: when they look, and how they move the lr."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .probe import Closure, LineProbe


class ProbeScheduler:
    """A tuner that multiplies the lr of all groups by what a look along the step tells.

    Args:
        optimizer: any torch optimizer whose ``step()`` needs no closure.
        model: its buffers are kept; None where it has none.
        every: steps from one look to the next; the first step is one.
        min_lr, max_lr: the range of each group's lr.
        probe_options: LineProbe's ``backend``, ``reduce_group`` and ``process_group``.

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
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of 1 or more, got {every!r}")
        if not 0 <= min_lr <= max_lr:
            raise ValueError(f"expected 0 <= min_lr <= max_lr, got {min_lr} and {max_lr}")
        self.optimizer = optimizer
        self.probe = LineProbe(optimizer, model, **probe_options)
        self.every, self.min_lr, self.max_lr = every, float(min_lr), float(max_lr)
        self.count = 0
        self.losses: list[float] = []
        """Of the last look, in the order of the multiples."""

    @property
    def due(self) -> bool:
        """Whether the next ``step`` looks, and so calls its closure."""
        return self.count % self.every == 0

    def step(self, closure: Closure) -> bool:
        """Look if it is time, and move the lr.

        Call it after the backward pass and before the optimizer's step, in every step.

        Args:
            closure: as for :class:`LineProbe`; called only when ``due``.

        Returns:
            Whether the lr was changed.

        Raises:
            ValueError: if no weight has a gradient; nothing has changed then.
        """
        looks = self.due
        factor = self._factor(closure) if looks else None
        self.count += 1
        if factor is None:
            return False
        # Read first: groups that were made without an lr of their own share one tensor.
        rates = [factor * rate for rate in self.get_last_lr()]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            set_lr(group, min(self.max_lr, max(self.min_lr, rate)))
        return True

    def _factor(self, closure: Closure) -> float | None:
        """Return what to multiply the lr by, or None to leave it."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """Return each group's lr as it stands."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs; the lrs themselves are in the optimizer's own state dict."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state_dict; load the optimizer's, too.

        Raises:
            ValueError: for a state dict with other entries.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"expected the entries {sorted(self.state_dict())}, got {sorted(state)}"
            )
        if not isinstance(state["count"], int) or state["count"] < 0:
            raise ValueError(f"count must be an integer of 0 or more, got {state['count']!r}")
        vars(self).update(state)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set a group's lr; a tensor stays the same tensor."""
    if torch.is_tensor(group["lr"]):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def finite(factor: float) -> float | None:
    """Return a factor, or None for one that is none."""
    return factor if math.isfinite(factor) and factor > 0 else None
