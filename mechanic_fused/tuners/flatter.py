"""FlatterFaster: momentum that follows the lr by a power law."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

POWER = 2 / 3
MOST = 0.999
"""The largest β: at an lr of 0 the law itself would say 1."""


class FlatterFaster:
    """Couple the momentum to the lr, so that 1 − β goes with lr^(2/3).

    β = 1 − (1 − β_ref)·(lr/lr_ref)^(2/3), clamped to [0, 0.999], for each param group: SGD's
    ``momentum``, or the first of Adam's ``betas``. It is set at construction and at each step.

    Args:
        optimizer: any torch optimizer whose groups have ``betas`` or ``momentum``, ours among them.
            β_ref is what they have now.
        reference_lr: lr_ref; None: each group's ``initial_lr``, which lr schedulers set, or else
            its lr now. To be given where a warm-up starts from an ``initial_lr`` that is no peak,
            as that of OneCycleLR.

    Raises:
        ValueError: for groups without momentum, or with one or an lr_ref out of range.

    It has no memory and no passes of its own. Of a mechanized optimizer it sees the lr in
    param_groups, which is the schedule, and not the scale that the optimizer learns.

    Source: arXiv 2210.16400, which derives the law for SGD with label noise; Adam's β₁ by the same
    law, the reference point and the clamp are ours.

    Example:
        >>> import torch
        >>> from mechanic_fused.tuners import FlatterFaster
        >>> opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
        >>> schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=1 / 8)
        >>> coupling = FlatterFaster(opt)
        >>> opt.step()
        >>> schedule.step()
        >>> coupling.step()
        >>> round(opt.param_groups[0]["momentum"], 6)  # an eighth of the lr: a quarter of 1 − β
        0.975
    """

    def __init__(self, optimizer: Optimizer, reference_lr: float | None = None) -> None:
        self.optimizer = optimizer
        self.reference_lr = reference_lr
        self.references: list[tuple[float, float]] = []
        """(lr_ref, β_ref) of each group."""
        self.step()

    def step(self) -> None:
        """Set each group's momentum by its lr as it stands; call it after the lr scheduler's step.

        Groups added since the last call are referred to their lr and momentum now.

        Raises:
            ValueError: for an added group that has no momentum; nothing has changed then.
        """
        groups = self.optimizer.param_groups
        added = groups[len(self.references) :]
        self.references += [self._reference(group) for group in added]
        for group, (lr, beta) in zip(groups, self.references, strict=True):
            set_momentum(group, coupled(float(group["lr"]) / lr, beta))

    def get_last_momentum(self) -> list[float]:
        """Return each group's β as it stands."""
        return [momentum(group) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs; the momenta themselves are in the optimizer's state dict."""
        return {"references": [list(pair) for pair in self.references]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state_dict, and set the momenta by the lrs as they stand.

        Raises:
            ValueError: for a state dict with other entries, or of another number of groups.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"expected the entries {sorted(self.state_dict())}, got {sorted(state)}"
            )
        references = [(float(lr), float(beta)) for lr, beta in state["references"]]
        if len(references) != len(self.optimizer.param_groups):
            raise ValueError(
                f"expected references of {len(self.optimizer.param_groups)} param groups, "
                f"got {len(references)}"
            )
        if not all(0 < lr < math.inf and 0 < beta < 1 for lr, beta in references):
            raise ValueError(f"expected references lr > 0 and β in (0, 1), got {references}")
        self.references = references
        self.step()

    def _reference(self, group: dict[str, Any]) -> tuple[float, float]:
        lr = self.reference_lr
        if lr is None:
            lr = float(group.get("initial_lr", group["lr"]))
        if not 0 < lr < math.inf:
            raise ValueError(f"the reference lr must be finite and above 0, got {lr}")
        beta = momentum(group)
        if not 0 < beta < 1:
            raise ValueError(f"expected a momentum in (0, 1) to couple, got {beta}")
        return lr, beta


def coupled(ratio: float, beta: float) -> float:
    """Return β at lr/lr_ref = ratio."""
    return min(MOST, max(0.0, 1 - (1 - beta) * ratio**POWER))


def momentum(group: dict[str, Any]) -> float:
    """Return a group's momentum.

    Raises:
        ValueError: for a group without.
    """
    if "betas" in group:
        return float(group["betas"][0])
    if "momentum" in group:
        return float(group["momentum"])
    names = sorted(name for name in group if name != "params")
    raise ValueError(f"expected a param group with betas or momentum, got one with {names}")


def set_momentum(group: dict[str, Any], beta: float) -> None:
    """Set a group's momentum."""
    if "betas" in group:
        group["betas"] = (beta, *group["betas"][1:])
    else:
        group["momentum"] = beta
